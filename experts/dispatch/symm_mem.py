"""Write each token once into the memory of every rank that holds one of its experts, and the results back.

This is the dispatcher `symm_mem`. `experts.exchange` moves the rows: dispatch and the backward of combine push rows to
the experts, combine and the backward of dispatch push rows back. Every rank has room for the rows that any routing can
bring, so the number of rows is only on the device, and the host does not wait. On GPUs this needs torch's symmetric
memory between GPUs of one host. On a CPU, the ranks are processes of one host.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts import catalog
from experts.autocast import without_autocast
from experts.config import MoEConfig
from experts.dispatch import Dispatched, OverGroup
from experts.dispatch.collectives import largest
from experts.errors import InputError, Unsupported
from experts.exchange import Layout, Slabs, exchange_on
from experts.exchange.memory import destroy_buffers, ranks_cannot_share, shared_slabs
from experts.fp8.blocks import E4M3
from experts.fp8.tokens import PACKED, packed_width, unpacked

__all__ = ["SymmMem", "destroy_buffers", "make", "unsupported"]

#: A number of tokens that the ranks agree on is rounded up to a multiple of this number and of a sixteenth of the next
#: power of two. So layers with nearly the same number of tokens share their memory, and a few more tokens fit later.
FEWEST_TOKENS = 16


@dataclass(frozen=True)
class _Way:
    """How a dispatch sends its rows: `copied` says whether they get memory of their own, `fp8` whether in FP8."""

    slabs: Slabs
    n_local_experts: int
    copied: bool
    fp8: bool


@dataclass(frozen=True)
class _Route:
    """What combine and both backward passes need to move the rows of one dispatch. The tensors are on the device."""

    slabs: Slabs
    row_TP: Tensor
    counts_P: Tensor
    fp8: bool


class SymmMem(OverGroup):
    """The dispatcher over one process group of ranks on one host.

    Raises Unsupported, on all ranks, if the ranks cannot share memory.

    `max_tokens_per_rank` is the largest number of tokens that any rank passes to the layer. If it is None, the ranks
    agree on it at the layer's first forward: they take the largest number of tokens of that forward, rounded up. Only
    that forward waits for the device. `capacity_factor` scales the room for the rows that one rank sends to another: at
    1, there is room for the rows of an even routing. If it is None, there is room for all tokens.

    With `fp8_rows`, tokens and the gradients of combine's result travel in FP8 with scales, as `Fp8Tokens`. What the
    experts send back stays in x's dtype.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        config: MoEConfig,
        max_tokens_per_rank: int | None = None,
        capacity_factor: float | None = None,
        fp8_rows: bool = False,
    ) -> None:
        super().__init__(group)
        reason = ranks_cannot_share(group)
        if reason is not None:
            raise reason
        self._n_local_experts = config.n_routed_experts // group.size()
        self._max_tokens = max_tokens_per_rank
        self._capacity_factor = capacity_factor
        self._fp8_rows = fp8_rows

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        """Return the tokens that chose an expert of this rank, and rows that nobody filled, with indices of −1.

        Without gradients, the rows are in the shared memory itself, and the next exchange overwrites them. Raises
        InputError for more tokens than `max_tokens_per_rank`. If a rank sends more rows to another rank than
        `capacity_factor` allows, all ranks raise: InputError on a CPU, and on a GPU an error of CUDA.
        """
        slabs = self._slabs_for(x_TD, weights_TK)
        way = _Way(slabs, self._n_local_experts, torch.is_grad_enabled(), self._fp8_rows)
        tensors = x_TD.contiguous(), weights_TK.contiguous(), indices_TK.contiguous()
        x_RD, weights_RK, indices_RK, route = _Dispatch.apply(*tensors, way)
        if self._capacity_factor is not None:
            self._check_capacity(slabs)
        row_bytes = packed_width(x_TD.shape[1]) * PACKED.itemsize if self._fp8_rows else None
        return Dispatched(x_RD, weights_RK, indices_RK, route, row_bytes)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return this rank's tokens [T, D], summed over the ranks in y's dtype.

        The sum is taken in float32 (float64 for float64), in the order of the ranks.
        """
        tokens_TD: Tensor = _Combine.apply(y_RD, dispatched.origin)
        return tokens_TD

    def _slabs_for(self, x_TD: Tensor, weights_TK: Tensor) -> Slabs:
        num_tokens, dim = x_TD.shape
        if self._max_tokens is None:
            self._max_tokens = _rounded_up(largest(num_tokens, self._group, x_TD.device))
        if num_tokens > self._max_tokens:
            raise InputError(
                f"x has {num_tokens} tokens, but symm_mem has room for max_tokens_per_rank = {self._max_tokens}; set "
                "max_tokens_per_rank in BackendConfig to the largest number of tokens of any rank (without it, the "
                "first forward decides)"
            )
        num_choices = weights_TK.shape[1]
        rows = self._rows_per_slab(self._max_tokens, num_choices)
        layout = Layout(self._group.size(), rows, dim, num_choices, x_TD.dtype, weights_TK.dtype)
        return shared_slabs(self._group, x_TD.device, layout)

    def _rows_per_slab(self, max_tokens: int, num_choices: int) -> int:
        """Return the rows that one rank can send to another.

        With K choices spread evenly over P ranks, a token goes to a rank with probability 1 − (1 − 1/P)^K.
        """
        if self._capacity_factor is None:
            return max_tokens
        even = max_tokens * (1 - (1 - 1 / self._group.size()) ** num_choices)
        return min(max_tokens, math.ceil(self._capacity_factor * even))

    def _check_capacity(self, slabs: Slabs) -> None:
        counts_PP, most = slabs.own.counts_PP, slabs.layout.rows_per_slab
        remedy = f"capacity_factor = {self._capacity_factor} is too small for this routing; raise it, or leave it out"
        if counts_PP.is_cuda:  # the host cannot read the counts without waiting for the device
            torch._assert_async((counts_PP <= most).all(), f"a rank sends more than {most} rows to a rank: {remedy}")
        elif (sent := int(counts_PP.max())) > most:
            raise InputError(f"a rank sends {sent} rows to a rank, but there is room for {most}: {remedy}")


def make(
    group: dist.ProcessGroup,
    config: MoEConfig,
    max_tokens_per_rank: int | None = None,
    capacity_factor: float | None = None,
    fp8_rows: bool = False,
) -> SymmMem:
    """Return the dispatcher over a group, for the config's experts."""
    return SymmMem(group, config, max_tokens_per_rank, capacity_factor, fp8_rows)


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return why symm_mem cannot carry tokens on a device, or None where it can. It carries every dtype.

    Whether the ranks reach each other's memory is not known here: `SymmMem` raises Unsupported if they do not.
    """
    if device.type == "cpu":
        return None if hasattr(os, "memfd_create") else Unsupported("symm_mem needs Linux on a CPU; use alltoall")
    if device.type != "cuda":
        return Unsupported(f"symm_mem runs on CUDA GPUs and on CPUs, the device is {device.type}; use alltoall")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return Unsupported(catalog.missing("triton", error))
    return None


def _rounded_up(num_tokens: int) -> int:
    next_power = 1 << max(num_tokens - 1, 0).bit_length()
    step = max(FEWEST_TOKENS, next_power // 16)
    return max(1, math.ceil(num_tokens / step)) * step


class _Dispatch(Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, way: _Way
    ) -> tuple[Tensor, Tensor, Tensor, _Route]:
        exchange, slabs = exchange_on(x_TD.device), way.slabs
        sent_TX = _as_sent(x_TD, way.fp8)
        slabs.barrier()
        row_TP = exchange.place(slabs, indices_TK, way.n_local_experts)
        region_RX = slabs.own.rows_as(sent_TX)
        rows_RX = torch.empty_like(region_RX) if way.copied else region_RX
        exchange.push(slabs, sent_TX, row_TP, rows_RX, weights_TK, indices_TK)
        slabs.barrier()
        weights_RK, indices_RK, counts_P = exchange.take_choices(slabs)
        if way.copied:
            exchange.take_rows(slabs, counts_P, rows_RX)
        ctx.route = route = _Route(slabs, row_TP, counts_P, way.fp8)
        ctx.mark_non_differentiable(indices_RK)
        return _as_tokens(rows_RX, x_TD, way.fp8), weights_RK, indices_RK, route

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_x_RD: Tensor, grad_weights_RK: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        route: _Route = ctx.route
        grads = _bring_back(route, grad_x_RD, grad_weights_RK)
        return *grads, None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return _bring_back(route, y_RD)[0]

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        """Return the gradients in memory of their own: autograd may keep them while the slabs are used again."""
        route: _Route = ctx.route
        exchange, slabs = exchange_on(grad_TD.device), route.slabs
        sent_TX = _as_sent(grad_TD.contiguous(), route.fp8)
        slabs.barrier()
        rows_RX = torch.empty_like(slabs.own.rows_as(sent_TX))
        exchange.push(slabs, sent_TX, route.row_TP, rows_RX)
        slabs.barrier()
        exchange.take_rows(slabs, route.counts_P, rows_RX)
        return _as_tokens(rows_RX, grad_TD, route.fp8), None


def _as_sent(x_TD: Tensor, fp8: bool) -> Tensor:
    """Return tokens as they travel: as they are, or packed in FP8, which takes no more bytes than 16 bits."""
    if not fp8:
        return x_TD
    from experts.fp8.quantise import quantise_packed

    return quantise_packed(x_TD)


def _as_tokens(rows_RX: Tensor, x_TD: Tensor, fp8: bool) -> Tensor:
    """Return what arrived of tokens `x_TD` as an engine takes it."""
    return unpacked(rows_RX, x_TD.shape[1], E4M3, x_TD.dtype) if fp8 else rows_RX


def _bring_back(route: _Route, y_RD: Tensor, weights_RK: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the sums of each token's rows [T, D], and of its weights [T, K] if weights are given."""
    exchange, slabs = exchange_on(y_RD.device), route.slabs
    y_RD, weights_RK = y_RD.contiguous(), None if weights_RK is None else weights_RK.contiguous()
    slabs.barrier()
    exchange.push_back(slabs, y_RD, route.counts_P, weights_RK)
    slabs.barrier()
    return exchange.sum_rows(slabs, route.row_TP, y_RD, weights_RK)
