"""Pack and unpack messages in Triton: each function is one kernel, and no function waits for the device.

A program of pack has one token and a stretch of the token's columns: it reads them once and writes them into the
messages to each of the token's ranks. A program of sum reads the token's row of each message and writes the sum once.
The first row of each message follows from the counts, which every program adds up itself.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.messages import ALIGNMENT_BYTES, INDEX_BYTES, Form, Plan, choices_bytes, rounded_up
from experts.messages.fused import kernels
from experts.steps.fused.launch import launch

MAX_STRETCH = 1024  # columns of one token per program: 16 bytes of bfloat16 per thread
TILE = 1024  # elements per program where a program has several rows
MAX_INDICES = 8192  # indices that a program of `kernels.plan` reads at a time


def plan(indices_TK: Tensor, num_ranks: int, n_local_experts: int) -> tuple[Tensor, Tensor]:
    """As `Messages.plan`."""
    num_tokens, num_choices = indices_TK.shape
    row_TP = torch.empty(num_tokens, num_ranks, dtype=torch.int32, device=indices_TK.device)
    sizes_2P = torch.empty(2, num_ranks, dtype=torch.int32, device=indices_TK.device)
    choices = triton.next_power_of_2(num_choices)
    block = max(16, MAX_INDICES // choices)
    launch(
        kernels.plan,
        (max(1, triton.cdiv(num_tokens, block)), num_ranks),  # without tokens, the counts are zero
        *(indices_TK.contiguous(), row_TP, sizes_2P, num_tokens, n_local_experts),
        P=num_ranks,
        K=num_choices,
        CHOICES=choices,
        BLOCK=block,
        num_warps=16,
    )
    return row_TP, sizes_2P


def pack(plan: Plan, x_TD: Tensor, weights_TK: Tensor | None = None, indices_TK: Tensor | None = None) -> Tensor:
    """As `Messages.pack`."""
    num_tokens, num_ranks = plan.row_TP.shape
    num_rows = plan.form.most_rows(num_tokens, num_ranks - 1)
    rows_SD = torch.empty(num_rows, plan.form.dim, dtype=x_TD.dtype, device=x_TD.device)
    _pack(plan, rows_SD, x_TD, weights_TK, indices_TK, first=0, last=num_ranks, absent=plan.own)
    return rows_SD


def pack_own(
    plan: Plan,
    message_SD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor | None = None,
    indices_TK: Tensor | None = None,
) -> None:
    """As `Messages.pack_own`."""
    _pack(plan, message_SD, x_TD, weights_TK, indices_TK, first=plan.own, last=plan.own + 1, absent=-1)


def _pack(
    plan: Plan,
    packed_SD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor | None,
    indices_TK: Tensor | None,
    first: int,
    last: int,
    absent: int,
) -> None:
    """Write the messages to the ranks `first` … `last − 1` without `absent`."""
    (num_tokens, num_ranks), dim = plan.row_TP.shape, plan.form.dim
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    indices_TK = None if indices_TK is None else indices_TK.contiguous()
    stretch = _stretch(dim)
    launch(
        kernels.pack,
        (num_tokens, triton.cdiv(dim, stretch)),
        *(x_TD.contiguous(), packed_SD, plan.row_TP, plan.counts_P, weights_TK, indices_TK, dim, first, absent),
        WITH_CHOICES=weights_TK is not None,
        TARGETS=last - first,
        P=num_ranks,
        STRETCH=stretch,
        **_constants(plan.form),
    )


def take_choices(received_RD: Tensor, counts_P: Tensor, longest: int, form: Form) -> tuple[Tensor, Tensor]:
    """As `Messages.take_choices`."""
    shape = received_RD.shape[0], form.n_activated_experts
    weights_RK = torch.empty(shape, dtype=form.weights_dtype, device=received_RD.device)
    indices_RK = torch.empty(shape, dtype=torch.int64, device=received_RD.device)
    constants = _constants(form)
    rows = max(1, TILE // constants["CHOICES"])
    launch(
        kernels.take_choices,
        (counts_P.shape[0], triton.cdiv(longest, rows)),
        *(received_RD, weights_RK, indices_RK, counts_P, form.dim),
        P=counts_P.shape[0],
        ROWS=rows,
        **constants,
    )
    return weights_RK, indices_RK


def sum_rows(
    plan: Plan, rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `Messages.sum_rows`."""
    (num_tokens, num_ranks), form = plan.row_TP.shape, plan.form
    sums_TD = torch.empty(num_tokens, form.dim, dtype=rows[0].dtype, device=rows[0].device)
    weights_TK = None
    if weights is not None:
        shape = num_tokens, form.n_activated_experts
        weights_TK = torch.empty(shape, dtype=weights[0].dtype, device=rows[0].device)
    stretch = _stretch(form.dim)
    launch(
        kernels.sum_rows,
        (num_tokens, triton.cdiv(form.dim, stretch)),
        *rows,
        *(weights or (None, None)),
        *(sums_TD, weights_TK, plan.row_TP, plan.counts_P, form.dim, plan.own),
        WITH_WEIGHTS=weights is not None,
        SUM=_sum_type(rows[0].dtype),
        WEIGHTS_SUM=_sum_type(form.weights_dtype if weights is None else weights[0].dtype),
        P=num_ranks,
        STRETCH=stretch,
        **_constants(form),
    )
    return sums_TD, weights_TK


def pack_choices(weights_TK: Tensor, indices_TK: Tensor, num_rows: int) -> Tensor:
    """As `Messages.pack_choices`. The bytes between weights and indices stay unwritten."""
    num_tokens, num_choices = weights_TK.shape
    start, end = choices_bytes(num_rows, num_choices, weights_TK.dtype)
    packed = torch.empty(rounded_up(end, ALIGNMENT_BYTES), dtype=torch.uint8, device=weights_TK.device)
    num_filled, num_elements = num_tokens * num_choices, num_rows * num_choices
    launch(
        kernels.pack_choices,
        (triton.cdiv(num_elements, TILE),),
        *(weights_TK.contiguous(), indices_TK.contiguous(), packed, num_filled, num_elements, start),
        TILE=TILE,
    )
    return packed


def unpack_choices(
    packed: Tensor, num_rows: int, n_activated_experts: int, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `Messages.unpack_choices`."""
    start, end = choices_bytes(num_rows, n_activated_experts, weights_dtype)
    size = rounded_up(end, ALIGNMENT_BYTES)
    num_parts = packed.shape[0] // size if size else 0
    shape = num_parts * num_rows, n_activated_experts
    weights_RK = torch.empty(shape, dtype=weights_dtype, device=packed.device)
    indices_RK = torch.empty(shape, dtype=torch.int64, device=packed.device)
    num_elements = num_rows * n_activated_experts
    launch(
        kernels.unpack_choices,
        (num_parts, triton.cdiv(num_elements, TILE)),
        *(packed, weights_RK, indices_RK, num_elements, start, size),
        TILE=TILE,
    )
    return weights_RK, indices_RK


def _constants(form: Form) -> dict[str, Any]:
    return {
        "K": form.n_activated_experts,
        "CHOICES": triton.next_power_of_2(form.n_activated_experts),
        "WEIGHTS_BYTES": form.n_activated_experts * form.weights_dtype.itemsize,
        "INDICES_BYTES": form.n_activated_experts * INDEX_BYTES,
        "ROW_BYTES": form.row_bytes,
        "UNIT": form.unit,
    }


def _stretch(dim: int) -> int:
    stretch: int = min(MAX_STRETCH, triton.next_power_of_2(dim))
    return stretch


def _sum_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype is torch.float64 else tl.float32
