"""Sum each expert's rows (the gradient of the expert's bias), and multiply each token with each of its rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.steps import Permutation
from experts.steps.fused.launch import launch

MAX_PARTS = 16  # programs that share an expert's rows: enough even if one expert has all rows
MIN_ROWS_OF_PART = 64
ROWS, COLUMNS = 32, 128
ROWS_OF_SUM = 1024  # a program adds so many rows at a time to its total, so that rounding errors stay small
STRETCH = 1024


def sum_by_expert(rows_NC: Tensor, permutation: Permutation, weights_TK: Tensor | None = None) -> Tensor:
    """As `Steps.sum_by_expert`. A program sums a fixed share of an expert's rows. torch adds the shares in order."""
    num_rows, width = rows_NC.shape
    num_experts = permutation.offsets_L.shape[0]
    num_parts = min(MAX_PARTS, max(1, triton.cdiv(num_rows, MIN_ROWS_OF_PART)))
    parts_LPC = torch.empty(num_experts, num_parts, width, dtype=torch.float32, device=rows_NC.device)
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    launch(
        _sum_parts,
        (num_experts, num_parts, triton.cdiv(width, COLUMNS)),
        *(rows_NC.contiguous(), parts_LPC, permutation.offsets_L, permutation.row_to_slot_N, weights_TK, width),
        PARTS=num_parts,
        WEIGHTS=weights_TK is not None,
        ROWS_OF_SUM=ROWS_OF_SUM,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return parts_LPC.sum(dim=1).to(rows_NC.dtype)


def dot_rows(x_TD: Tensor, permutation: Permutation, y_ND: Tensor | None, bias_LD: Tensor | None) -> Tensor:
    """As `Steps.dot_rows`."""
    num_tokens, dim = x_TD.shape
    num_choices = permutation.n_activated_experts
    dots_TK = torch.empty(num_tokens, num_choices, dtype=torch.float32, device=x_TD.device)
    launch(
        _dot,
        (num_tokens, num_choices),
        *(x_TD.contiguous(), dots_TK, None if y_ND is None else y_ND.contiguous()),
        *(None if bias_LD is None else bias_LD.contiguous(), permutation.slot_to_row_S),
        *(permutation.row_to_expert_N, permutation.offsets_L[-1:]),
        DIM=dim,
        K=num_choices,
        ROWS=y_ND is not None,
        BIAS=bias_LD is not None,
        STRETCH=min(STRETCH, triton.next_power_of_2(dim)),
    )
    return dots_TK


@triton.jit
def _sum_parts(
    rows,
    parts,
    offsets,
    row_to_slot,
    weights,
    width,
    PARTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS_OF_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert, part = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    group_start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    group_end = tl.load(offsets + expert)
    share = tl.cdiv(group_end - group_start, PARTS)
    first = group_start + part * share
    last = tl.minimum(first + share, group_end)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    lost = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    start = first
    while start < last:  # Triton's interpreter cannot run a range with loaded bounds
        end = tl.minimum(start + ROWS_OF_SUM, last)
        sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        while start < end:
            row = start + tl.arange(0, ROWS)
            inside = (row < end)[:, None] & (columns < width)[None, :]
            where = row.to(tl.int64)[:, None] * width + columns[None, :]
            value = tl.load(rows + where, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTS:
                slot = tl.load(row_to_slot + row, mask=row < end, other=0)
                value *= tl.load(weights + slot, mask=row < end, other=0.0).to(tl.float32)[:, None]
            sums += value
            start += ROWS
        # keep what the addition rounds off (Knuth's TwoSum)
        new = total + sums
        added = new - total
        lost += (total - (new - added)) + (sums - added)
        total = new
    where = (expert.to(tl.int64) * PARTS + part) * width + columns
    tl.store(parts + where, tl.sum(total, axis=0) + tl.sum(lost, axis=0), mask=columns < width)


@triton.jit
def _dot(
    x,
    dots,
    y,
    bias,
    slot_to_row,
    row_to_expert,
    num_local,
    DIM: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = token * K + tl.program_id(1)
    row = tl.load(slot_to_row + slot)
    local = row < tl.load(num_local)
    expert = tl.load(row_to_expert + row, mask=local, other=0)
    total = tl.zeros([STRETCH], dtype=tl.float32)
    for start in range(0, DIM, STRETCH):
        columns = start + tl.arange(0, STRETCH)
        inside = (columns < DIM) & local
        value = tl.zeros([STRETCH], dtype=tl.float32)
        if ROWS:
            value += tl.load(y + row * DIM + columns, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + expert * DIM + columns, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(x + token * DIM + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(dots + slot, tl.sum(total))
