"""Quantise rows transposed, as `experts.fp8.turned.turn_rows` does, on Hopper GPUs.

A warp has all 128 rows of 16 columns. So it finds the scale of a column alone, and stores 64 contiguous bytes of a
transposed column, without shared memory.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from experts.fp8.blocks import BLOCK, LEAST_SCALE, num_blocks
from experts.fp8.rounding import largest
from experts.gemm.kernels import TILE_FIELDS
from experts.steps import Permutation
from experts.steps.fused.launch import launch

#: Blocks of columns per program, its warps, and the registers of a thread that let two programs run at a time.
BLOCKS_AT_ONCE, WARPS, REGISTERS = 4, 8, 128

_BLOCK, _LEAST_SCALE = gl.constexpr(BLOCK), gl.constexpr(LEAST_SCALE)


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
    """Write the values and scales of a `TurnedRows`, from columns of `rows` from `start` on; see `turn`."""
    most, width, _ = values.shape
    launch(
        turn_rows,
        (most * triton.cdiv(halves * num_blocks(width // halves), BLOCKS_AT_ONCE),),
        *(rows.view(torch.int32), values.view(torch.int32), scales, listed, permutation.row_to_slot_N),
        *(rows.shape[1] // 2, start // 2, most, width // halves // 2),
        HALVES=halves,
        K=permutation.n_activated_experts,
        GATHER=gather,
        BY_COLUMN=by_column,
        BF16=rows.dtype is torch.bfloat16,
        LARGEST=largest(values.dtype),
        AT_ONCE=BLOCKS_AT_ONCE,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )


@gluon.jit
def _scale_of(largest_value, LARGEST: gl.constexpr):
    """Return what `experts.fp8.rounding.scale_of` returns: the quotient, rounded to the nearest. NaN stays NaN.

    The quotient by a constant is corrected once (Markstein, IBM J. Res. Dev. 34, 1990), which takes fewer instructions
    than a division.
    """
    first = largest_value * (1.0 / LARGEST)
    rest = gl.fma(first, -LARGEST, largest_value)
    scale = gl.where(first == float("inf"), first, gl.fma(rest, 1.0 / LARGEST, first))
    return gl.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale)


@gluon.jit
def _reciprocal(scale):
    """Return 1 / scale, rounded to the nearest."""
    return gl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [scale], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _four_bytes(first, second, third, fourth, LARGEST: gl.constexpr):
    """Return the FP8 numbers of four tiles in words of 32 bits; see `experts.fp8.rounding.four_bytes`."""
    NAME: gl.constexpr = "e4m3x2" if LARGEST < 1000 else "e5m2x2"
    return gl.inline_asm_elementwise(
        "{.reg .b16 low, high;\n"
        "cvt.rn.satfinite." + NAME + ".f32 low, $2, $1;\n"
        "cvt.rn.satfinite." + NAME + ".f32 high, $4, $3;\n"
        "mov.b32 $0, {low, high};}",
        "=r,f,f,f,f",
        [first, second, third, fourth],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _apart(words, BF16: gl.constexpr):
    """Return in float32 the two bfloat16 or float16 numbers of each word of 32 bits, the lower half first."""
    if BF16:
        low, high = words << 16, words & -65536
    else:
        low = (words & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True).to(gl.float32)
        high = ((words >> 16) & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True).to(gl.float32)
    return low.to(gl.float32, bitcast=True), high.to(gl.float32, bitcast=True)


@gluon.jit
def _largest(first, second, third, fourth):
    """Return the largest magnitudes of four tiles, of each element."""
    left, right = gl.maximum(gl.abs(first), gl.abs(second)), gl.maximum(gl.abs(third), gl.abs(fourth))
    return gl.maximum(left, right)


@gluon.jit
def _source(rows, row_to_slot, row, end, stride, K: gl.constexpr, GATHER: gl.constexpr):
    source = row.to(gl.int64)
    if GATHER:
        source = gl.load(row_to_slot + row, mask=row < end, other=0) // K
    return rows + gl.expand_dims(source * stride, 1)


@gluon.jit
def _load(source, row, end, where, mask):
    return gl.load(source + where, mask=gl.expand_dims(row < end, 1) & mask, other=0)


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
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [1, num_warps], [1, 0])
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
    group = gl.arange(0, _BLOCK // 4, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, _BLOCK // 2, layout=gl.SliceLayout(0, layout))
    row = first_row + 4 * group
    source_0 = _source(rows, row_to_slot, row, end, row_stride, K, GATHER)
    source_1 = _source(rows, row_to_slot, row + 1, end, row_stride, K, GATHER)
    source_2 = _source(rows, row_to_slot, row + 2, end, row_stride, K, GATHER)
    source_3 = _source(rows, row_to_slot, row + 3, end, row_stride, K, GATHER)
    first_block = stretch * AT_ONCE
    first_column = block.to(gl.int64) * (2 * HALVES * part_width)
    for column_block in range(first_block, gl.minimum(first_block + AT_ONCE, HALVES * column_blocks)):
        in_part = column_block % column_blocks * (_BLOCK // 2) + word
        inside = in_part < part_width
        pair = column_block // column_blocks * part_width + in_part
        where, mask = gl.expand_dims(start + pair, 0), gl.expand_dims(inside, 0)
        words_0, words_1 = _load(source_0, row, end, where, mask), _load(source_1, row + 1, end, where, mask)
        words_2, words_3 = _load(source_2, row + 2, end, where, mask), _load(source_3, row + 3, end, where, mask)
        left_0, right_0 = _apart(words_0, BF16)
        left_1, right_1 = _apart(words_1, BF16)
        left_2, right_2 = _apart(words_2, BF16)
        left_3, right_3 = _apart(words_3, BF16)
        left = _largest(left_0, left_1, left_2, left_3)
        right = _largest(right_0, right_1, right_2, right_3)
        if BY_COLUMN:
            left, right = _scale_of(gl.max(left, axis=0), LARGEST), _scale_of(gl.max(right, axis=0), LARGEST)
            target = scales + first_column + 2 * pair
            gl.store(target, left, mask=inside)
            gl.store(target + 1, right, mask=inside)
            by_left, by_right = gl.expand_dims(_reciprocal(left), 0), gl.expand_dims(_reciprocal(right), 0)
        else:
            scale = _scale_of(gl.max(gl.max(gl.maximum(left, right), axis=0), axis=0), LARGEST)
            gl.store(scales + block * (HALVES * column_blocks) + column_block, scale)
            by_left = _reciprocal(scale)
            by_right = by_left
        target = values + gl.expand_dims((first_column + 2 * pair) * (_BLOCK // 4), 0) + gl.expand_dims(group, 1)
        words = _four_bytes(left_0 * by_left, left_1 * by_left, left_2 * by_left, left_3 * by_left, LARGEST)
        gl.store(target, words, mask=mask)
        words = _four_bytes(right_0 * by_right, right_1 * by_right, right_2 * by_right, right_3 * by_right, LARGEST)
        gl.store(target + _BLOCK // 4, words, mask=mask)
