"""Compute the gradients of SwiGLU, and quantise them for the products of rows and of weights, on Hopper GPUs.

A program has 128 rows of one expert, and 128 columns of gate and of up. It reads them once, and holds the gradients in
words of two columns until it knows the scales of the rows and of the block.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from experts.fp8.blocks import BLOCK, E4M3, Rows, num_blocks, stored_width
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
from experts.fp8.turned import RowBlocks, TurnedRows
from experts.gemm.hopper.finished import add_sums
from experts.gemm.hopper.gate import glu_backward
from experts.gemm.kernels import TILE_FIELDS
from experts.steps import Permutation
from experts.steps.fused.launch import launch

#: The warps of a program, and the registers of a thread.
WARPS, REGISTERS = 16, 128
_ROWS_AT_ONCE = 1024

_BLOCK, _WORDS = gl.constexpr(BLOCK), gl.constexpr(BLOCK // 2)
_LARGEST = gl.constexpr(largest(E4M3))
#: Of a tile of words, and of the tile of their columns in the same threads.
_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4, 4], [8, 1, 4], [4, 1, WARPS // 4], [2, 1, 0]))
_COLUMNS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4, 8], [8, 1, 4], [4, 1, WARPS // 4], [2, 1, 0]))


def activate_and_turn(
    h_NH: Tensor,
    grad_NI: Tensor,
    permutation: Permutation,
    weights_TK: Tensor,
    blocks: RowBlocks,
    dtype: torch.dtype,
    padded: bool,
) -> tuple[Rows, TurnedRows, TurnedRows, Tensor]:
    """See `experts.fp8.activation.activate_backward_turned`. `h` and `grad` are contiguous, in bfloat16."""
    (num_rows, inter), device = grad_NI.shape, h_NH.device
    part, column_blocks = stored_width(inter, 2, padded), num_blocks(inter)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    values = torch.empty(num_rows, 2 * part, dtype=dtype, device=device)
    rows = Rows(values, floats(2 * column_blocks, num_rows), 2)
    turned_h, turned_a = (
        TurnedRows(torch.empty(blocks.most, width, BLOCK, dtype=fmt, device=device), floats(blocks.most, num_scales))
        for width, fmt, num_scales in ((2 * inter, dtype, 2 * column_blocks), (inter, E4M3, inter))
    )
    sums_CN, grad_weights_TK = floats(column_blocks, num_rows), floats(*weights_TK.shape).zero_()
    launch(
        turn_gradients,
        (blocks.most * column_blocks,),
        *(h_NH.view(torch.int32), grad_NI.view(torch.int32), values, rows.scales),
        *(turned_h.values, turned_h.scales, turned_a.values, turned_a.scales),
        *(sums_CN, weights_TK.contiguous(), permutation.row_to_slot_N, blocks.listed, num_rows),
        INTER=inter,
        PART=part,
        LARGEST=largest(dtype),
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
    launch(
        add_sums,
        (triton.cdiv(num_rows, _ROWS_AT_ONCE),),
        *(sums_CN, grad_weights_TK, permutation.row_to_slot_N, permutation.offsets_L[-1:], num_rows),
        TILES=column_blocks,
        ROWS=_ROWS_AT_ONCE,
    )
    return rows, turned_h, turned_a, grad_weights_TK


@gluon.jit
def _together(low, high):
    """Round float32 numbers to bfloat16, and return them in words of two."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _sigmoid(x):
    """Return 1 / (1 + 2^(-x·log2 e)), without the care for denormal numbers that exp and a division take."""
    return gl.inline_asm_elementwise(
        "{.reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"
        " add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t;}",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _differentiate(h, grad, turned, turned_scales, row, end, weight, word, INTER: gl.constexpr):
    """Return words of the gradients of gate and of up, and each row's sum for the gradient of its routing weight.

    Store the weighted activation transposed, with a scale for each column.
    """
    inside = inside_tile(row, end, word, INTER // 2)
    source = h + (row * INTER)[:, :, None] + word[None, None, :]
    gate_low, gate_high = apart(gl.load(source, mask=inside, other=0), True)
    up_low, up_high = apart(gl.load(source + INTER // 2, mask=inside, other=0), True)
    source = grad + (row * (INTER // 2))[:, :, None] + word[None, None, :]
    low, high = apart(gl.load(source, mask=inside, other=0), True)
    value_low, by_gate_low, by_up_low = glu_backward(gate_low, up_low, _sigmoid(gate_low))
    value_high, by_gate_high, by_up_high = glu_backward(gate_high, up_high, _sigmoid(gate_high))
    sums = gl.sum(low * value_low + high * value_high, axis=2)
    weight = weight[:, :, None]
    low *= weight
    high *= weight
    of_gate = _together(low * by_gate_low, high * by_gate_high)
    of_up = _together(low * by_up_low, high * by_up_high)
    # rounded first, as where a kernel of its own quantises them
    a_low, a_high = apart(_together(value_low * weight, value_high * weight), True)
    scale = scale_of(largest_of_columns(a_low), _LARGEST)
    gl.store(turned_scales + 2 * word, scale, mask=word < INTER // 2)
    store_columns(turned, a_low * reciprocal(scale)[None, None, :], 0, 2 * word, INTER, _LAYOUT)
    scale = scale_of(largest_of_columns(a_high), _LARGEST)
    gl.store(turned_scales + 2 * word + 1, scale, mask=word < INTER // 2)
    store_columns(turned, a_high * reciprocal(scale)[None, None, :], 0, 2 * word + 1, INTER, _LAYOUT)
    return of_gate, of_up, sums


@gluon.jit
def _store(
    values,
    scales,
    turned,
    turned_scale,
    words,
    row,
    end,
    column_block,
    INTER: gl.constexpr,
    PART: gl.constexpr,
    LARGEST: gl.constexpr,
):
    """Store the gradients of gate, or those of up: with a scale for each row, and transposed with one for the block."""
    low, high = apart(words, True)
    most = largest_of_rows(gl.maximum(gl.abs(low), gl.abs(high)))
    scale, block_scale = scale_of(most, LARGEST), scale_of(gl.max(gl.max(most, axis=1), axis=0), LARGEST)
    gl.store(scales + row, scale, mask=row < end)
    gl.store(turned_scale, block_scale)
    by_block = reciprocal(block_scale)
    column = column_block * _BLOCK + 2 * words_of_tile(_WORDS, _LAYOUT)
    store_columns(turned, low * by_block, 0, column, INTER, _LAYOUT)
    store_columns(turned, high * by_block, 0, column + 1, INTER, _LAYOUT)
    by_row = reciprocal(scale)[:, :, None]
    both = gl.reshape(gl.join(low * by_row, high * by_row), [_BLOCK // 4, 4, _BLOCK])
    both = gl.convert_layout(both, _COLUMNS_LAYOUT, assert_trivial=True)
    row, column = rows_of_tile(_COLUMNS_LAYOUT), column_block * _BLOCK + words_of_tile(_BLOCK, _COLUMNS_LAYOUT)
    target = values + (row * (2 * PART))[:, :, None] + column[None, None, :]
    gl.store(target, both.to(values.dtype.element_ty), mask=inside_tile(row, end, column, PART))


@gluon.jit
def turn_gradients(
    h,
    grad,
    values,
    scales,
    turned_h,
    turned_h_scales,
    turned_a,
    turned_a_scales,
    sums,
    weights,
    row_to_slot,
    listed,
    num_rows,
    INTER: gl.constexpr,
    PART: gl.constexpr,
    LARGEST: gl.constexpr,
    num_warps: gl.constexpr,
):
    """`h` and `grad` are words of two columns. `values` have PART columns of gate, and the same of up."""
    COLUMN_BLOCKS: gl.constexpr = (INTER + _BLOCK - 1) // _BLOCK
    block, column_block = gl.program_id(0) // COLUMN_BLOCKS, gl.program_id(0) % COLUMN_BLOCKS
    entry = listed + (1 + block) * TILE_FIELDS
    first_row, end = gl.load(entry + 2), gl.load(entry + 3)  # before the test, so that no load waits for another
    if block >= gl.load(listed):
        return
    end -= first_row  # from here on, rows count from the first one of the block
    row_to_slot += first_row
    scales += column_block * num_rows + first_row
    sums += column_block * num_rows + first_row
    first_row = first_row.to(gl.int64)
    h += first_row * INTER
    grad += first_row * (INTER // 2)
    values += first_row * (2 * PART)
    turned_h_scales += 2 * COLUMN_BLOCKS * block + column_block
    first_column = block.to(gl.int64) * INTER
    turned_a_scales += first_column
    turned_a += first_column * _BLOCK
    turned_h += first_column * (2 * _BLOCK)
    row = rows_of_tile(_LAYOUT)
    word = column_block * _WORDS + words_of_tile(_WORDS, _LAYOUT)
    slot = gl.load(row_to_slot + row, mask=row < end, other=0)
    weight = gl.load(weights + slot, mask=row < end, other=0.0).to(gl.float32)
    of_gate, of_up, row_sums = _differentiate(h, grad, turned_a, turned_a_scales, row, end, weight, word, INTER)
    gl.store(sums + row, row_sums, mask=row < end)
    _store(values, scales, turned_h, turned_h_scales, of_gate, row, end, column_block, INTER, PART, LARGEST)
    scales += COLUMN_BLOCKS * num_rows
    turned_h += INTER * _BLOCK
    turned_h_scales += COLUMN_BLOCKS
    _store(values + PART, scales, turned_h, turned_h_scales, of_up, row, end, column_block, INTER, PART, LARGEST)
