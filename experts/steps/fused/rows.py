"""Gather the tokens' rows for the experts, and sum each token's rows.

In both kernels, a program has one token and a stretch of the token's columns, and finds the token's K rows by
`slot_to_row`. To gather, the program reads the token once and writes the rows. To sum, it reads the rows and writes the
token once. All accesses are coalesced.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.steps import Permutation
from experts.steps.fused.launch import launch

MAX_STRETCH = 1024  # columns per program: 16 bytes of bfloat16 per thread


def gather_rows(x_TD: Tensor, permutation: Permutation, weights_TK: Tensor | None = None) -> Tensor:
    """As `Steps.gather_rows`. Rows past the last group stay unwritten."""
    num_tokens, dim = x_TD.shape
    rows_ND = torch.empty(permutation.num_rows, dim, dtype=x_TD.dtype, device=x_TD.device)
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    stretch = min(MAX_STRETCH, triton.next_power_of_2(dim))
    launch(
        _gather,
        (num_tokens, triton.cdiv(dim, stretch)),
        *(x_TD.contiguous(), rows_ND, permutation.slot_to_row_S, permutation.offsets_L[-1:], weights_TK, dim),
        K=permutation.n_activated_experts,
        WEIGH=weights_TK is not None,
        STRETCH=stretch,
    )
    return rows_ND


def sum_rows(
    y_ND: Tensor,
    permutation: Permutation,
    weights_TK: Tensor | None = None,
    bias_LD: Tensor | None = None,
    weigh_rows: bool = False,
) -> Tensor:
    """As `Steps.sum_rows`."""
    dim = y_ND.shape[1]
    sums_TD = torch.empty(permutation.num_tokens, dim, dtype=y_ND.dtype, device=y_ND.device)
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    bias_LD = None if bias_LD is None else bias_LD.contiguous()
    stretch = min(MAX_STRETCH, triton.next_power_of_2(dim))
    launch(
        _sum,
        (permutation.num_tokens, triton.cdiv(dim, stretch)),
        *(y_ND.contiguous(), sums_TD, permutation.slot_to_row_S, permutation.offsets_L[-1:]),
        *(weights_TK, bias_LD, permutation.row_to_expert_N, dim),
        K=permutation.n_activated_experts,
        WEIGH=weigh_rows,
        BIAS=bias_LD is not None,
        STRETCH=stretch,
    )
    return sums_TD


@triton.jit
def _gather(x, rows, slot_to_row, num_local, weights, dim, K: tl.constexpr, WEIGH: tl.constexpr, STRETCH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    end = tl.load(num_local)
    values = tl.load(x + token * dim + columns, mask=columns < dim, other=0.0)
    for k in tl.static_range(K):
        row = tl.load(slot_to_row + token * K + k)
        local = row < end
        out = values
        if WEIGH:
            weight = tl.load(weights + token * K + k, mask=local, other=0.0).to(tl.float32)
            out = (values.to(tl.float32) * weight).to(values.dtype)
        tl.store(rows + row * dim + columns, out, mask=(columns < dim) & local)


@triton.jit
def _sum(
    rows,
    sums,
    slot_to_row,
    num_local,
    weights,
    bias,
    row_to_expert,
    dim,
    K: tl.constexpr,
    WEIGH: tl.constexpr,
    BIAS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    end = tl.load(num_local)
    total = tl.zeros([STRETCH], dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(slot_to_row + token * K + k)
        local = row < end
        inside = (columns < dim) & local
        value = tl.load(rows + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
        if BIAS or WEIGH:
            weight = tl.load(weights + token * K + k, mask=local, other=0.0).to(tl.float32)
        if BIAS:
            expert = tl.load(row_to_expert + row, mask=local, other=0)
            added = tl.load(bias + expert * dim + columns, mask=inside, other=0.0).to(tl.float32)
            value = value + (added if WEIGH else weight * added)
        if WEIGH:
            value = value * weight
        total += value
    tl.store(sums + token * dim + columns, total.to(sums.dtype.element_ty), mask=columns < dim)
