"""Compute the weighted activation and its gradients. Each of the two kernels reads its rows once.

The kernels look up a row's routing weight by the row's slot and a row's bias by the row's expert. So neither weights
nor biases are copied into permuted order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.activations import ActivationForm, activation_form
from experts.config import MoEConfig
from experts.steps import Permutation
from experts.steps.fused.launch import launch
from experts.steps.fused.tiles import activate_tile, find_rows, load_tile, store_tile

TILE = 1024  # elements of the result per program: of the sizes tried on an H200, the fastest (2026-11)
MAX_COLUMNS = 1024  # columns of one row per program


def activate(
    h_NH: Tensor, permutation: Permutation, weights_TK: Tensor | None, bias_LH: Tensor | None, config: MoEConfig
) -> Tensor:
    """As `Steps.activate`. Rows past the last group stay unwritten."""
    form = activation_form(config)
    inter = h_NH.shape[1] // (2 if form.gated else 1)
    a_NI = torch.empty(h_NH.shape[0], inter, dtype=h_NH.dtype, device=h_NH.device)
    rows, columns = _tile(inter)
    launch(
        _activate,
        (triton.cdiv(h_NH.shape[0], rows), triton.cdiv(inter, columns)),
        *(h_NH.contiguous(), a_NI, *_looked_up(permutation, weights_TK, bias_LH)),
        *(form.alpha, form.limit, form.offset),
        **_constants(form, weights_TK, bias_LH, rows, columns),
        INTER=inter,
    )
    return a_NI


def activate_backward(
    h_NH: Tensor,
    grad_NI: Tensor,
    permutation: Permutation,
    weights_TK: Tensor | None,
    bias_LH: Tensor | None,
    config: MoEConfig,
    again: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `Steps.activate_backward`. With `again`, it writes the first two results over h and `grad_NI`."""
    form = activation_form(config)
    h_NH, grad_NI = h_NH.contiguous(), grad_NI.contiguous()
    grad_h_NH = h_NH if again else torch.empty_like(h_NH)
    grad_weights_TK = None
    if weights_TK is not None:
        grad_weights_TK = torch.zeros(weights_TK.shape, dtype=torch.float32, device=h_NH.device)
    inter = grad_NI.shape[1]
    rows, columns = _tile(inter)
    launch(
        _activate_backward,
        (triton.cdiv(h_NH.shape[0], rows),),
        *(h_NH, grad_NI, grad_h_NH, grad_weights_TK, *_looked_up(permutation, weights_TK, bias_LH)),
        *(form.alpha, form.limit, form.offset),
        **_constants(form, weights_TK, bias_LH, rows, columns),
        INTER=inter,
        AGAIN=again,
    )
    return grad_h_NH, grad_NI if again else None, grad_weights_TK


def _tile(inter: int) -> tuple[int, int]:
    columns = min(MAX_COLUMNS, triton.next_power_of_2(inter))
    return TILE // columns, columns


def _looked_up(
    permutation: Permutation, weights_TK: Tensor | None, bias_LH: Tensor | None
) -> tuple[Tensor | None, ...]:
    return (
        None if weights_TK is None else weights_TK.contiguous(),
        None if bias_LH is None else bias_LH.contiguous(),
        permutation.row_to_slot_N,
        permutation.row_to_expert_N,
        permutation.offsets_L[-1:],
    )


def _constants(
    form: ActivationForm, weights_TK: Tensor | None, bias_LH: Tensor | None, rows: int, columns: int
) -> dict[str, int | bool]:
    return {
        "GATED": form.gated,
        "INTERLEAVED": form.interleaved,
        "GELU": form.gelu,
        "LIMITED": form.limit > 0,
        "WEIGHTS": weights_TK is not None,
        "BIAS": bias_LH is not None,
        "ROWS": rows,
        "COLUMNS": columns,
    }


@triton.jit
def _activate(
    h,
    out,
    weights,
    bias,
    row_to_slot,
    row_to_expert,
    num_local,
    alpha,
    limit,
    offset,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GELU: tl.constexpr,
    LIMITED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTER: tl.constexpr,
):
    if tl.program_id(0).to(tl.int64) * ROWS >= tl.load(num_local):
        return
    row, valid, _, expert, weight = find_rows(row_to_slot, row_to_expert, num_local, weights, WEIGHTS, ROWS)
    start = tl.program_id(1) * COLUMNS
    columns = start + tl.arange(0, COLUMNS)
    value, _, _ = activate_tile(
        h, bias, row, valid, expert, start, alpha, limit, offset, GATED, INTERLEAVED, GELU, LIMITED, BIAS, INTER, ROWS,
        COLUMNS,
    )  # fmt: skip
    store_tile(out, value * weight[:, None], row, valid, columns, 0, INTER, INTER)


@triton.jit
def _activate_backward(
    h,
    grad,
    grad_h,
    grad_weights,
    weights,
    bias,
    row_to_slot,
    row_to_expert,
    num_local,
    alpha,
    limit,
    offset,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GELU: tl.constexpr,
    LIMITED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTER: tl.constexpr,
    AGAIN: tl.constexpr,
):
    if tl.program_id(0).to(tl.int64) * ROWS >= tl.load(num_local):
        return
    row, valid, slot, expert, weight = find_rows(row_to_slot, row_to_expert, num_local, weights, WEIGHTS, ROWS)
    by_weight = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, INTER, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        da = load_tile(grad, bias, row, valid, expert, columns, 0, INTER, INTER, False)
        value, by_gate, by_up = activate_tile(
            h, bias, row, valid, expert, start, alpha, limit, offset, GATED, INTERLEAVED, GELU, LIMITED, BIAS, INTER,
            ROWS, COLUMNS,
        )  # fmt: skip
        by_weight += tl.sum(da * value, axis=1)
        weighted = da * weight[:, None]
        if AGAIN:
            tl.debug_barrier()  # the stores overwrite the loads: wait until every warp has read
            store_tile(grad, value * weight[:, None], row, valid, columns, 0, INTER, INTER)
        if not GATED:
            store_tile(grad_h, weighted * by_gate, row, valid, columns, 0, INTER, INTER)
        elif INTERLEAVED:
            pairs = 2 * start + tl.arange(0, 2 * COLUMNS)
            both = tl.interleave(weighted * by_gate, weighted * by_up)
            store_tile(grad_h, both, row, valid, pairs, 0, 2 * INTER, 2 * INTER)
        else:
            store_tile(grad_h, weighted * by_gate, row, valid, columns, 0, INTER, 2 * INTER)
            store_tile(grad_h, weighted * by_up, row, valid, columns, INTER, INTER, 2 * INTER)
    if WEIGHTS:
        tl.store(grad_weights + slot, by_weight, mask=valid)
