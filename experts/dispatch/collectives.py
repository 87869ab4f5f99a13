"""Collectives with autograd over a process group: each direction's backward is the other direction.

torch 2.13 renamed two of them and warns about the old names, which 2.11 has alone.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows, in the order of the ranks; all have as many. No autograd."""
    gathered = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
    _all_gather(gathered, rows.contiguous(), group=group)
    return gathered


def reduce_scatter_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of this rank's share of the rows. No autograd."""
    share = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    _reduce_scatter(share, rows.contiguous(), group=group)
    return share


def all_to_all_rows(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """`send[r]` consecutive rows to rank r, `receive[r]` from it, in the order of the ranks. No autograd."""
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


class AllGatherRows(Function):
    """`all_gather_rows`, whose gradient is summed back to the rank that each row came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_rows(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_rows(grad, ctx.group), None


class ReduceScatterRows(Function):
    """`reduce_scatter_rows`, whose gradient goes to every rank that added to the sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_rows(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_rows(grad, ctx.group), None


class AllGatherChoices(Function):
    """Every rank's routing weights and indices in one message; gradients of the weights are summed back."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, indices_TK: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        gathered = all_gather_rows(pack_choices(weights_TK, indices_TK), group)
        weights_RK, indices_RK = unpack_choices(gathered, weights_TK.dtype)
        ctx.mark_non_differentiable(indices_RK)
        return weights_RK, indices_RK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RK: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_rows(grad_RK, ctx.group), None, None


def pack_choices(weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
    """Routing weights and indices of each row in bytes: one message, since a small one costs its latency alone.

    Indices travel as int32; one beyond that, which no layer has an expert of, as the nearest.
    """
    indices_RK = indices_RK.clamp(-1, torch.iinfo(torch.int32).max).int()
    return torch.cat([_dense(one).view(torch.uint8) for one in (indices_RK, weights_RK)], dim=1)


def unpack_choices(packed: Tensor, weights_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Routing weights and int64 indices out of rows of bytes."""
    index_bytes = packed.shape[1] // (torch.int32.itemsize + weights_dtype.itemsize) * torch.int32.itemsize
    indices, weights = packed.tensor_split([index_bytes], dim=1)
    return _dense(weights).view(weights_dtype), _dense(indices).view(torch.int32).long()


def _dense(tensor: Tensor) -> Tensor:
    """A copy, which any dtype can view: contiguous() leaves a single row or column as it is, whatever its strides."""
    return tensor.clone(memory_format=torch.contiguous_format)


def largest(count: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """The largest count of any rank. Waits for the device."""
    counts = torch.full((1,), count, device=device)  # made there: a copy from the host would wait for it too
    dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=group)
    return int(counts)
