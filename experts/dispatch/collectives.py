"""Run collectives over a process group, with and without autograd.

The backward of all-gather is reduce-scatter, and the backward of reduce-scatter is all-gather. torch 2.13 renamed the
functions of these two collectives and warns about the old names. torch 2.11 has only the old names.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts.messages import messages_on

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return every rank's rows, in the order of the ranks. All ranks must have the same number of rows. No autograd."""
    gathered = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
    _all_gather(gathered, rows.contiguous(), group=group)
    return gathered


def reduce_scatter_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum over the ranks of this rank's share of the rows. No autograd."""
    share = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    _reduce_scatter(share, rows.contiguous(), group=group)
    return share


def begin_sizes(sizes_2P: Tensor, group: dist.ProcessGroup) -> Callable[[], list[list[int]]]:
    """Begin to send one number to each rank, and to receive one from each rank: `sizes_2P[0]` and `sizes_2P[1]`.

    Returns a function that waits for both on the host, and returns them. It does not wait for later work.
    """
    sent_P, received_P = sizes_2P
    if not sizes_2P.is_cuda:
        dist.all_to_all_single(received_P, sent_P, group=group)
        return sizes_2P.tolist
    with _beside(sizes_2P.device) as stream:
        dist.all_to_all_single(received_P, sent_P, group=group)
        copy = sizes_2P.to("cpu", non_blocking=True)  # to pinned memory
        copied = stream.record_event()

    def arrived() -> list[list[int]]:
        copied.synchronize()
        sizes: list[list[int]] = copy.tolist()
        return sizes

    return arrived


def begin_all_to_all(received: list[Tensor], sent: list[Tensor], group: dist.ProcessGroup) -> Callable[[], object]:
    """Begin to send a tensor to each rank, and to receive one from each rank, into the tensors of `received`.

    Returns a function that waits for that; on a GPU, the device waits, and the host goes on. No autograd. gloo has no
    such call for lists, so with gloo the tensors are copied.
    """
    if sent[0].is_cuda and dist.get_backend(group) != "gloo":
        with _beside(sent[0].device) as stream:
            dist.all_to_all(received, sent, group=group)
        return lambda: torch.cuda.current_stream(stream.device).wait_stream(stream)
    lengths = [len(one) for one in received]
    whole = torch.cat(received)
    dist.all_to_all_single(whole, torch.cat(sent), lengths, [len(one) for one in sent], group=group)
    for one, part in zip(received, whole.split(lengths), strict=True):
        one.copy_(part)
    return lambda: None


@contextmanager
def _beside(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Run what follows on another stream, after the work so far, at the same time as later work.

    The stream has a high priority, so that the GPU starts a collective before kernels that wait at the same time: other
    ranks wait for the collective. Tensors that are used there must stay alive until the current stream has waited for
    the stream.
    """
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


class AllGatherRows(Function):
    """`all_gather_rows` with autograd: backward sums the gradients on the rank that each row came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_rows(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_rows(grad, ctx.group), None


class ReduceScatterRows(Function):
    """`reduce_scatter_rows` with autograd: backward sends the gradient to every rank that added to the sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_rows(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_rows(grad, ctx.group), None


class AllGatherChoices(Function):
    """Every rank's routing weights and indices, gathered in one message, with autograd for the routing weights.

    A small message costs only its latency, so one message costs half as much as two messages. All ranks pass the same
    `num_rows`. A rank with fewer tokens fills up with weights of zero and indices of −1. Indices are sent as int32. An
    index that does not fit is clamped to the largest int32, which also is not an expert of any layer.

    Backward sums the gradients of a routing weight on the rank that the weight came from.
    """

    @staticmethod
    def forward(
        ctx: Any, weights_TK: Tensor, indices_TK: Tensor, group: dist.ProcessGroup, num_rows: int
    ) -> tuple[Tensor, Tensor]:
        num_tokens, num_choices = weights_TK.shape
        ctx.group, ctx.num_tokens = group, num_tokens
        messages = messages_on(weights_TK.device)
        gathered = all_gather_rows(messages.pack_choices(weights_TK, indices_TK, num_rows), group)
        weights_RK, indices_RK = messages.unpack_choices(gathered, num_rows, num_choices, weights_TK.dtype)
        ctx.mark_non_differentiable(indices_RK)
        return weights_RK, indices_RK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RK: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        return reduce_scatter_rows(grad_RK, ctx.group)[: ctx.num_tokens], None, None, None


def largest(count: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """Return the largest count of all ranks. Waits for the device."""
    counts = torch.full((1,), count, device=device)  # on the device: a copy from the host would wait
    dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=group)
    return int(counts)
