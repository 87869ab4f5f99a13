"""Quantise rows transposed, as `experts.fp8.turned.turn_rows` does, on Hopper GPUs.

A warp has all 128 rows of 16 columns. So it finds the scale of a column alone, and stores 64 contiguous bytes of a
transposed column. Only the scale of 128 columns needs shared memory.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from experts.fp8.blocks import BLOCK, num_blocks
from experts.fp8.hopper.tiles import (
    apart,
    inside_tile,
    largest_of_columns,
    largest_of_rows,
    reciprocal,
    rows_of_tile,
    scale_of,
    store_columns,
    words_of_tile,
)
from experts.fp8.rounding import largest
from experts.gemm.kernels import TILE_FIELDS
from experts.steps import Permutation
from experts.steps.fused.launch import launch

#: Blocks of columns per program, its warps, and the registers of a thread: for scales by column, and by block. On an
#: H200 (2026-11-30), BY_BLOCK took 0.6 to 0.7 times as long for scales by block, and 1.2 times for scales by column.
BY_COLUMN, BY_BLOCK = (4, 8, 128), (1, 4, 168)

_BLOCK = gl.constexpr(BLOCK)


def turn(
    rows: Tensor,
    values: Tensor,
    scales: Tensor,
    listed: Tensor,
    permutation: Permutation,
    gather: bool,
    by_column: bool,
    halves: int,
    start: int,
) -> None:
    """Write the values and scales of a `TurnedRows`, from columns of `rows` from `start` on.

    The other arguments are those of `experts.fp8.turned.turn`.
    """
    most, width, _ = values.shape
    at_once, warps, registers = BY_COLUMN if by_column else BY_BLOCK
    launch(
        turn_rows,
        (most * triton.cdiv(halves * num_blocks(width // halves), at_once),),
        *(rows.view(torch.int32), values, scales, listed, permutation.row_to_slot_N),
        *(rows.shape[1] // 2, start // 2, most, width // halves // 2),
        HALVES=halves,
        K=permutation.n_activated_experts,
        GATHER=gather,
        BY_COLUMN=by_column,
        BF16=rows.dtype is torch.bfloat16,
        LARGEST=largest(values.dtype),
        AT_ONCE=at_once,
        num_warps=warps,
        maxnreg=registers,
    )


@gluon.jit
def turn_rows(
    rows,
    values,
    scales,
    listed,
    row_to_slot,
    row_stride,
    start,
    most_blocks,
    part_width,
    HALVES: gl.constexpr,
    K: gl.constexpr,
    GATHER: gl.constexpr,
    BY_COLUMN: gl.constexpr,
    BF16: gl.constexpr,
    LARGEST: gl.constexpr,
    AT_ONCE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Quantise AT_ONCE blocks of columns of a block of rows. The arguments are those of the other `turn_rows`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4, 4], [16, 1, 2], [1, 1, num_warps], [2, 1, 0])
    column_blocks = gl.cdiv(part_width, _BLOCK // 2)
    program = gl.program_id(0)
    if GATHER:  # several rows read the same token: all rows of some columns first
        block, stretch = program % most_blocks, program // most_blocks
    else:
        stretches = gl.cdiv(HALVES * column_blocks, AT_ONCE)
        block, stretch = program // stretches, program % stretches
    entry = listed + (1 + block) * TILE_FIELDS
    first_row, end = gl.load(entry + 2), gl.load(entry + 3)  # before the test, so that no load waits for another
    if block >= gl.load(listed):
        return
    row = first_row + rows_of_tile(layout)
    source = row.to(gl.int64)
    if GATHER:
        source = gl.load(row_to_slot + row, mask=row < end, other=0) // K
    source = rows + (source * row_stride)[:, :, None]
    first_block = stretch * AT_ONCE
    first_column = block.to(gl.int64) * (2 * HALVES * part_width)
    for column_block in range(first_block, gl.minimum(first_block + AT_ONCE, HALVES * column_blocks)):
        in_part = column_block % column_blocks * (_BLOCK // 2) + words_of_tile(_BLOCK // 2, layout)
        shift = column_block // column_blocks * part_width
        inside = inside_tile(row, end, in_part, part_width)
        low, high = apart(gl.load(source + (start + shift + in_part)[None, None, :], mask=inside, other=0), BF16)
        column, end_column = 2 * (shift + in_part), 2 * (shift + part_width)
        if BY_COLUMN:
            low_scale = scale_of(largest_of_columns(low), LARGEST)
            high_scale = scale_of(largest_of_columns(high), LARGEST)
            gl.store(scales + first_column + column, low_scale, mask=column < end_column)
            gl.store(scales + first_column + column + 1, high_scale, mask=column < end_column)
            by_low, by_high = reciprocal(low_scale)[None, None, :], reciprocal(high_scale)[None, None, :]
        else:
            scale = scale_of(gl.max(gl.max(largest_of_rows(gl.maximum(gl.abs(low), gl.abs(high))), 1), 0), LARGEST)
            gl.store(scales + block * (HALVES * column_blocks) + column_block, scale)
            by_low = reciprocal(scale)
            by_high = by_low
        store_columns(values, low * by_low, first_column, column, end_column, layout)
        store_columns(values, high * by_high, first_column, column + 1, end_column, layout)
