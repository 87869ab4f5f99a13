"""Compute the weighted activation and its gradients, and quantise the results to FP8 in the same kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.activations import SWIGLU, ActivationForm, activation_form
from experts.config import MoEConfig
from experts.fp8.blocks import BLOCK, E4M3, Rows, num_blocks, stored_width
from experts.fp8.rounding import interpreted, largest, reciprocal, scale_of, to_fp8
from experts.fp8.turned import RowBlocks, TurnedRows
from experts.gemm.gradients import runs_on_hopper
from experts.steps import Permutation
from experts.steps.fused.launch import launch
from experts.steps.fused.tiles import activate_tile, find_rows, load_tile, store_tile

_BLOCK = tl.constexpr(BLOCK)
#: Rows of a program, in the forward and in the backward kernel.
ROWS, ROWS_BACK = 16, 8


def activate(
    h_NH: Tensor, permutation: Permutation, weights_TK: Tensor | None, bias_LH: Tensor | None, config: MoEConfig
) -> Rows:
    """Return what `Steps.activate` returns, in FP8. Rows past the last group stay unwritten."""
    form = activation_form(config)
    num_rows, inter = h_NH.shape[0], h_NH.shape[1] // (2 if form.gated else 1)
    values = torch.empty(num_rows, inter, dtype=E4M3, device=h_NH.device)
    scales = torch.empty(num_blocks(inter), num_rows, dtype=torch.float32, device=h_NH.device)
    launch(
        activate_rows,
        (triton.cdiv(num_rows, ROWS), num_blocks(inter)),
        *(h_NH.contiguous(), values, scales, *_looked_up(permutation, weights_TK, bias_LH), num_rows),
        *(form.alpha, form.limit, form.offset),
        **_constants(form, weights_TK, bias_LH, ROWS),
        LARGEST=largest(E4M3),
        INTER=inter,
    )
    return Rows(values, scales)


def activate_backward(
    h_NH: Tensor,
    grad_NI: Tensor,
    permutation: Permutation,
    weights_TK: Tensor,
    bias_LH: Tensor | None,
    config: MoEConfig,
    dtype: torch.dtype,
    padded: bool = False,
) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """Return the gradient of h in FP8, the same unquantised, the activation, and the gradient of the weights [T, K].

    The gradient of h [N, H] is written over h, and the activation [N, I] over `grad_NI`. `dtype` is the FP8 format. If
    gate and up are in halves, each half has blocks of its own. With `padded`, zeros fill up the halves in FP8
    (`experts.fp8.blocks.stored_width`).
    """
    form = activation_form(config)
    h_NH, grad_NI = h_NH.contiguous(), grad_NI.contiguous()
    (num_rows, width), inter = h_NH.shape, grad_NI.shape[1]
    halves = 2 if form.gated and not form.interleaved else 1
    part = stored_width(width // halves, halves, padded)
    values = torch.empty(num_rows, halves * part, dtype=dtype, device=h_NH.device)
    blocks = halves * num_blocks(width // halves)
    scales = torch.empty(blocks, num_rows, dtype=torch.float32, device=h_NH.device)
    grad_weights_TK = torch.zeros(weights_TK.shape, dtype=torch.float32, device=h_NH.device)
    launch(
        activate_rows_backward,
        (triton.cdiv(num_rows, ROWS_BACK),),
        *(h_NH, grad_NI, values, scales, grad_weights_TK, *_looked_up(permutation, weights_TK, bias_LH), num_rows),
        *(form.alpha, form.limit, form.offset),
        **_constants(form, weights_TK, bias_LH, ROWS_BACK),
        LARGEST=largest(dtype),
        INTER=inter,
        PART=part,
    )
    return Rows(values, scales, halves), h_NH, grad_NI, grad_weights_TK


def activate_backward_turned(
    h_NH: Tensor,
    grad_NI: Tensor,
    permutation: Permutation,
    weights_TK: Tensor,
    bias_LH: Tensor | None,
    config: MoEConfig,
    dtype: torch.dtype,
    padded: bool,
    blocks: RowBlocks,
) -> tuple[Rows, TurnedRows, TurnedRows, Tensor] | None:
    """Return the gradient of h in FP8 and the same transposed, the activation transposed, and that of the weights.

    Return None if no kernel computes all of them, or if they would need too much memory. It takes a Hopper GPU,
    bfloat16, and SwiGLU without a limit and a bias. The arguments are those of `activate_backward`, which are only
    read, and the blocks of rows. The transposed gradient and the transposed activation, by column, are what
    `experts.fp8.turned.turn` returns for the results of `activate_backward`. The gradient of h is rounded to bfloat16
    before it is quantised as rows, too, where `activate_backward` quantises it in float32.
    """
    num_rows, num_experts = permutation.num_rows, permutation.offsets_L.shape[0]
    takes = h_NH.dtype is torch.bfloat16 and activation_form(config) == SWIGLU and bias_LH is None
    # Arguments and results have 11 bytes for each element of the activation. The gradients of the weights have 6 bytes
    # for each element of the down projections, and are allocated later. So the peak of a train step stays theirs.
    fits = 11 * num_rows <= 6 * num_experts * config.dim
    if not takes or not fits or num_rows == 0 or not runs_on_hopper(h_NH.device, num_rows):
        return None
    from experts.fp8 import hopper

    return hopper.activate_and_turn(
        h_NH.contiguous(), grad_NI.contiguous(), permutation, weights_TK, blocks, dtype, padded
    )


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
    form: ActivationForm, weights_TK: Tensor | None, bias_LH: Tensor | None, rows: int
) -> dict[str, int | bool]:
    return {
        "GATED": form.gated,
        "INTERLEAVED": form.interleaved,
        "GELU": form.gelu,
        "LIMITED": form.limit > 0,
        "WEIGHTS": weights_TK is not None,
        "BIAS": bias_LH is not None,
        "ROWS": rows,
        "EXACT": interpreted(),
        "num_warps": 4,
    }


@triton.jit
def _store_quantised(
    values,
    scales,
    tile,
    row,
    valid,
    column,
    block,
    shift,
    width,
    num_blocks,
    num_rows,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LARGEST: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Quantise a tile [ROWS, BLOCKS · 128]. `column` and `block` count from `shift`, the start of the half."""
    cut = tl.reshape(tile, [ROWS, BLOCKS, _BLOCK])
    scale = scale_of(tl.max(tl.abs(cut), axis=2), LARGEST)
    value = to_fp8(cut * tl.expand_dims(reciprocal(scale), 2), LARGEST, EXACT).to(values.dtype.element_ty)
    value = tl.reshape(value, [ROWS, BLOCKS * _BLOCK])
    where = row[:, None] * STRIDE + shift + column[None, :]
    tl.store(values + where, value, mask=valid[:, None] & (column < width)[None, :])
    blocks = block + tl.arange(0, BLOCKS)
    where = blocks.to(tl.int64)[None, :] * num_rows + row[:, None]
    tl.store(scales + where, scale, mask=valid[:, None] & (blocks < num_blocks)[None, :])


@triton.jit
def activate_rows(
    h,
    values,
    scales,
    weights,
    bias,
    row_to_slot,
    row_to_expert,
    num_local,
    num_rows,
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
    EXACT: tl.constexpr,
    LARGEST: tl.constexpr,
    INTER: tl.constexpr,
):
    if tl.program_id(0).to(tl.int64) * ROWS >= tl.load(num_local):
        return
    row, valid, _, expert, weight = find_rows(row_to_slot, row_to_expert, num_local, weights, WEIGHTS, ROWS)
    block = tl.program_id(1)
    start = block * _BLOCK
    column = start + tl.arange(0, _BLOCK)
    value, _, _ = activate_tile(
        h, bias, row, valid, expert, start, alpha, limit, offset, GATED, INTERLEAVED, GELU, LIMITED, BIAS, INTER, ROWS,
        _BLOCK,
    )  # fmt: skip
    tile = tl.where((column < INTER)[None, :], value * weight[:, None], 0.0)
    BLOCKS: tl.constexpr = (INTER + _BLOCK - 1) // _BLOCK
    _store_quantised(
        values, scales, tile, row, valid, column, block, 0, INTER, BLOCKS, num_rows, INTER, ROWS, 1, LARGEST, EXACT
    )


@triton.jit
def activate_rows_backward(
    h,
    grad,
    values,
    scales,
    grad_weights,
    weights,
    bias,
    row_to_slot,
    row_to_expert,
    num_local,
    num_rows,
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
    EXACT: tl.constexpr,
    LARGEST: tl.constexpr,
    INTER: tl.constexpr,
    PART: tl.constexpr,
):
    """`values` have PART columns for each half."""
    if tl.program_id(0).to(tl.int64) * ROWS >= tl.load(num_local):
        return
    row, valid, slot, expert, weight = find_rows(row_to_slot, row_to_expert, num_local, weights, WEIGHTS, ROWS)
    by_weight = tl.zeros([ROWS], dtype=tl.float32)
    BLOCKS: tl.constexpr = (INTER + _BLOCK - 1) // _BLOCK
    for block in range(BLOCKS):
        start = block * _BLOCK
        column = start + tl.arange(0, _BLOCK)
        da = load_tile(grad, bias, row, valid, expert, column, 0, INTER, INTER, False)
        value, by_gate, by_up = activate_tile(
            h, bias, row, valid, expert, start, alpha, limit, offset, GATED, INTERLEAVED, GELU, LIMITED, BIAS, INTER,
            ROWS, _BLOCK,
        )  # fmt: skip
        by_weight += tl.sum(da * value, axis=1)
        weighted = da * weight[:, None]  # zero in columns past the end
        tl.debug_barrier()  # the stores overwrite the loads: wait until every warp has read
        store_tile(grad, value * weight[:, None], row, valid, column, 0, INTER, INTER)
        if not GATED:
            tile = weighted * by_gate
            store_tile(h, tile, row, valid, column, 0, INTER, INTER)
            _store_quantised(
                values, scales, tile, row, valid, column, block, 0, INTER, BLOCKS, num_rows, INTER, ROWS, 1, LARGEST,
                EXACT,
            )  # fmt: skip
        elif INTERLEAVED:
            pairs = 2 * start + tl.arange(0, 2 * _BLOCK)
            both = tl.interleave(weighted * by_gate, weighted * by_up)
            store_tile(h, both, row, valid, pairs, 0, 2 * INTER, 2 * INTER)
            _store_quantised(
                values, scales, both, row, valid, pairs, 2 * block, 0, 2 * INTER, tl.cdiv(2 * INTER, _BLOCK), num_rows,
                2 * INTER, ROWS, 2, LARGEST, EXACT,
            )  # fmt: skip
        else:
            dgate, dup = weighted * by_gate, weighted * by_up
            store_tile(h, dgate, row, valid, column, 0, INTER, 2 * INTER)
            store_tile(h, dup, row, valid, column, INTER, INTER, 2 * INTER)
            _store_quantised(
                values, scales, dgate, row, valid, column, block, 0, PART, BLOCKS, num_rows, 2 * PART, ROWS, 1,
                LARGEST, EXACT,
            )  # fmt: skip
            _store_quantised(
                values, scales, dup, row, valid, column, BLOCKS + block, PART, PART, 2 * BLOCKS, num_rows, 2 * PART,
                ROWS, 1, LARGEST, EXACT,
            )  # fmt: skip
    if WEIGHTS:
        tl.store(grad_weights + slot, by_weight, mask=valid)
