"""Multiply rows in FP8 by gate and up, activate the sums and quantise the result; see `experts.fp8.hopper`.

The two blocks of columns of a tile are the same columns of gate and of up. So the group of warps that has a row has all
128 values of a block of the row's activation, and finds the block's scale itself. The up projection is not stored.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from experts.activations import ActivationForm
from experts.fp8.blocks import BLOCK, E4M3, LEAST_SCALE, Matrices, Rows, num_blocks
from experts.fp8.hopper.rows import count_rounds, grouped_parts, load_tiles, read_tile, tile_of_round
from experts.fp8.hopper.steps import (
    LOADING_REGISTERS,
    REGISTERS_OF_TWO,
    SLAB,
    WARPS,
    allocate,
    count_blocks,
    described,
    multiply_pair,
    no_block,
    skip_steps,
    store_block,
)
from experts.gemm.hopper.descriptors import MOST_ROWS
from experts.gemm.hopper.gate import glu
from experts.gemm.hopper.rounding import rounded
from experts.steps.fused.launch import launch

#: Steps whose operands are in shared memory at the same time.
STAGES = 4

_BLOCK, _SLAB = gl.constexpr(BLOCK), gl.constexpr(SLAB)
_LARGEST, _LEAST_SCALE = gl.constexpr(torch.finfo(E4M3).max), gl.constexpr(LEAST_SCALE)
_WARPS, _REGISTERS = gl.constexpr(WARPS), gl.constexpr(REGISTERS_OF_TWO)
_LOADING_REGISTERS, _STAGES = gl.constexpr(LOADING_REGISTERS), gl.constexpr(STAGES)


def multiply_and_activate(
    rows: Rows,
    up: Matrices,
    row_to_slot_N: Tensor,
    weights_TK: Tensor | None,
    form: ActivationForm,
    tiles: Tensor,
    programs: int,
    dtype: torch.dtype,
) -> Rows:
    """Return the weighted activation [N, I] of the up projection in FP8. Gate and up must be the halves of `up`.

    `dtype` is the one in which the up projection would be stored.

    `tiles` have 128 rows, and one block of columns of the activation. Rows past the last group stay unwritten.
    """
    experts, width, p_width = up.values.shape
    num_rows, inter = row_to_slot_N.shape[0], width // 2
    values = torch.empty(num_rows, inter, dtype=E4M3, device=rows.values.device)
    scales = torch.empty(num_blocks(inter), num_rows, dtype=torch.float32, device=rows.values.device)
    launch(
        multiply_and_activate_fp8,
        (programs,),
        described(rows.values.unsqueeze(1), [SLAB, 1, BLOCK]),
        rows.scales,
        described(up.values.view(experts * width, 1, p_width), [BLOCK, 1, BLOCK]),
        up.scales,
        grouped_parts(values, 1, [SLAB, BLOCK]),
        scales,
        *(tiles, None if weights_TK is None else weights_TK.contiguous(), row_to_slot_N),
        *(rows.scales.shape[1], p_width, inter),
        BF16=dtype is torch.bfloat16,
        ALPHA=form.alpha,
        LIMIT=form.limit,
        OFFSET=form.offset,
        GELU=form.gelu,
        WEIGHTS=weights_TK is not None,
        num_warps=WARPS,
    )
    return Rows(values, scales)


@gluon.jit
def _multiply(
    a_scales,
    b_scales,
    out,
    out_scales,
    tiles,
    memory,
    weights,
    row_to_slot,
    num_scales,
    p_width,
    q_width,
    BF16: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    OFFSET: gl.constexpr,
    GELU: gl.constexpr,
    WEIGHTS: gl.constexpr,
    WHICH: gl.constexpr,
):
    p_blocks, q_blocks = count_blocks(p_width), count_blocks(q_width)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _BLOCK, 32])
    rows = gl.arange(0, _SLAB, layout=gl.SliceLayout(1, layout))
    num_tiles = gl.load(tiles)
    step = 0
    done = no_block(out.dtype)
    row, end, column = 0, 0, 0
    for number in range(count_rounds(num_tiles)):
        expert, block, first_row, next_end = read_tile(tiles, tile_of_round(number))
        first_row += WHICH * _SLAB
        place = MOST_ROWS - end + row
        if first_row < next_end:
            a_where = a_scales + gl.minimum(first_row + rows, num_scales - 1)  # later rows are not stored
            gate_where = b_scales + (expert.to(gl.int64) * 2 * q_blocks + block) * p_blocks
            gate, up = multiply_pair(
                a_where, num_scales, gate_where, gate_where + q_blocks * p_blocks, 1, p_blocks, memory, step, out,
                done, done, MOST_ROWS, end, place, 0, column, 0, column, False, WHICH
            )  # fmt: skip
            # rounded first, as the up projection is where it is kept for backward
            DTYPE: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
            gate, up = rounded(gate, DTYPE).to(gl.float32), rounded(up, DTYPE).to(gl.float32)
            value = glu(gate, up, ALPHA, LIMIT, OFFSET, GELU)
            valid = first_row + rows < next_end
            most = gl.max(gl.maximum(value, -value), axis=1)
            scale = gl.div_rn(most, gl.full_like(most, _LARGEST))
            scale = gl.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale)
            done = (value * gl.expand_dims(gl.div_rn(gl.full_like(scale, 1.0), scale), 1)).to(out.dtype)
            if WEIGHTS:  # the weighted activation has the same values in FP8, and other scales
                slot = gl.load(row_to_slot + first_row + rows, mask=valid, other=0)
                scale *= gl.load(weights + slot, mask=valid, other=0.0).to(gl.float32)
            gl.store(out_scales + block.to(gl.int64) * num_scales + first_row + rows, scale, mask=valid)
        else:  # no row of the group is in this slab
            store_block(out, memory[2].index(WHICH), done, MOST_ROWS, end, place, 0, column)
            skip_steps(p_blocks, memory, step, WHICH, True)
            done = no_block(out.dtype)
        row, end, column = first_row, next_end, block * _BLOCK
        step += p_blocks
    store_block(out, memory[2].index(WHICH), done, MOST_ROWS, end, MOST_ROWS - end + row, 0, column)
    tma.store_wait(0)


@gluon.jit
def multiply_and_activate_fp8(
    a,
    a_scales,
    b,
    b_scales,
    out,
    out_scales,
    tiles,
    weights,
    row_to_slot,
    num_scales,
    p_width,
    q_width,
    BF16: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    OFFSET: gl.constexpr,
    GELU: gl.constexpr,
    WEIGHTS: gl.constexpr,
    num_warps: gl.constexpr,
):
    memory = allocate(a.dtype, b.dtype, out.dtype, 2, 2, _STAGES, 0)
    gl.warp_specialize(
        [
            (
                _multiply,
                (a_scales, b_scales, out, out_scales, tiles, memory, weights, row_to_slot, num_scales,
                 p_width, q_width, BF16, ALPHA, LIMIT, OFFSET, GELU, WEIGHTS, 0),
            ),
            (
                _multiply,
                (a_scales, b_scales, out, out_scales, tiles, memory, weights, row_to_slot, num_scales,
                 p_width, q_width, BF16, ALPHA, LIMIT, OFFSET, GELU, WEIGHTS, 1),
            ),
            (load_tiles, (a, b, tiles, memory, p_width, q_width, 1, 2, True)),
        ],
        [_WARPS, 1],
        [_REGISTERS, _LOADING_REGISTERS],
    )  # fmt: skip
