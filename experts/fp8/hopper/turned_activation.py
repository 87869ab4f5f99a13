"""Compute the gradients of SwiGLU, and quantise them for the products of rows and of weights, on Hopper GPUs.

A tile has 128 rows of one expert, and 128 columns of gate and of up. A program has one tile after another, and while it
computes one, the TMA copies the next ones to shared memory. The threads hold a tile's results in words of two columns
until they know the scales (`experts.fp8.hopper.scaling`).
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from experts.fp8.blocks import BLOCK, E4M3, Rows, num_blocks, stored_width
from experts.fp8.hopper.rows import grouped_parts
from experts.fp8.hopper.scaling import (
    FOUND,
    FOUND_LAYOUT,
    LAYOUT,
    PARTS,
    WARPS,
    each_row,
    leave_columns,
    leave_rows,
    of_warps,
    scales_of_columns,
    scales_of_rows,
    store_sums,
)
from experts.fp8.hopper.steps import shared_layout
from experts.fp8.hopper.tiles import apart, inside_tile, rows_of_tile, store_columns, words_of_tile
from experts.fp8.rounding import largest
from experts.fp8.turned import RowBlocks, TurnedRows
from experts.gemm.hopper.descriptors import MOST_ROWS, aligned
from experts.gemm.hopper.finished import add_sums
from experts.gemm.hopper.gate import glu_backward
from experts.gemm.kernels import TILE_FIELDS
from experts.steps import Permutation
from experts.steps.fused.launch import launch, multiprocessors

#: The registers of a thread, and the tiles that are in shared memory at the same time.
REGISTERS, STAGES = 128, 2
_ROWS_AT_ONCE = 1024

_BLOCK, _WORDS, _STAGES = gl.constexpr(BLOCK), gl.constexpr(BLOCK // 2), gl.constexpr(STAGES)
_LARGEST, _PARTS = gl.constexpr(largest(E4M3)), gl.constexpr(PARTS)
#: Of a tile of columns in the threads that have their words.
_COLUMNS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4, 8], [8, 1, 4], [PARTS, 1, WARPS // PARTS], [2, 1, 0]))
#: In shared memory: of a tile of words, and of reciprocals.
_TILE = gl.constexpr(shared_layout(3, 32))
_RECIPROCALS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


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
    programs = multiprocessors(device)

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
        (min(programs, blocks.most * column_blocks),),
        *(_words(h_NH, 2), _words(grad_NI, 1), values, rows.scales),
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


def _words(rows: Tensor, halves: int) -> TensorDescriptor:
    """Return the descriptor of words of two columns, for copies of tiles that end with the rows' group and the half."""
    return grouped_parts(aligned(rows).view(torch.int32), halves, [BLOCK, BLOCK // 2])


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
def _find_tile(listed, tile, num_tiles, COLUMN_BLOCKS: gl.constexpr):
    """Return a tile's first row, and the end of the expert's rows; no row after the last tile."""
    entry = listed + (1 + tile // COLUMN_BLOCKS) * TILE_FIELDS
    there = tile < num_tiles
    return gl.load(entry + 2, mask=there, other=0), gl.load(entry + 3, mask=there, other=0)


@gluon.jit
def _load_tile(h, grad, memory, stage, first_row, end, tile, num_tiles, COLUMN_BLOCKS: gl.constexpr):
    """Copy a tile of gate, of up and of grad to shared memory. Rows past the end, and columns past the last, are 0."""
    gates, ups, grads, loaded = memory
    SHAPE: gl.constexpr = h.block_type.shape
    barrier, there = loaded.index(stage), tile < num_tiles
    row, word = MOST_ROWS - end + first_row, tile % COLUMN_BLOCKS * _WORDS
    mbarrier.expect(barrier, 3 * h.block_type.nbytes, pred=there)
    target = gates.index(stage)._reinterpret(gl.int32, SHAPE, h.layout)
    tma.async_copy_global_to_shared(h, [MOST_ROWS, end, row, 0, word], barrier, target, pred=there)
    target = ups.index(stage)._reinterpret(gl.int32, SHAPE, h.layout)
    tma.async_copy_global_to_shared(h, [MOST_ROWS, end, row, 1, word], barrier, target, pred=there)
    target = grads.index(stage)._reinterpret(gl.int32, SHAPE, h.layout)
    tma.async_copy_global_to_shared(grad, [MOST_ROWS, end, row, 0, word], barrier, target, pred=there)


@gluon.jit
def _differentiate(gate, up, grad, by_weight):
    """Return words of the gradients of gate and of up, and of the weighted activation.

    Also return [32, 4, PARTS], each warp's sum of each row for the gradient of its routing weight.
    """
    gate_low, gate_high = apart(gate.load(LAYOUT), True)
    up_low, up_high = apart(up.load(LAYOUT), True)
    low, high = apart(grad.load(LAYOUT), True)
    value_low, by_gate_low, by_up_low = glu_backward(gate_low, up_low, _sigmoid(gate_low))
    value_high, by_gate_high, by_up_high = glu_backward(gate_high, up_high, _sigmoid(gate_high))
    products = low * value_low + high * value_high
    sums = gl.sum(gl.reshape(products, [_BLOCK // 4, 4, _PARTS, _WORDS // _PARTS]), axis=3)
    weight = each_row(by_weight)
    low *= weight
    high *= weight
    of_gate = _together(low * by_gate_low, high * by_gate_high)
    of_up = _together(low * by_up_low, high * by_up_high)
    # rounded first, as where a kernel of its own quantises them
    return of_gate, of_up, _together(value_low * weight, value_high * weight), sums


@gluon.jit
def _store(values, turned, words, reciprocals, by_block, end, column_block, INTER: gl.constexpr, PART: gl.constexpr):
    """Store the gradients of gate, or those of up: with a scale for each row, and transposed with one for the block."""
    low, high = apart(words, True)
    column = column_block * _BLOCK + 2 * words_of_tile(_WORDS, LAYOUT)
    store_columns(turned, low * by_block, 0, column, INTER, LAYOUT)
    store_columns(turned, high * by_block, 0, column + 1, INTER, LAYOUT)
    by_row = each_row(reciprocals)
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
    gates = gl.allocate_shared_memory(gl.int32, [_STAGES, _BLOCK // 4, 4, _WORDS], _TILE)
    ups = gl.allocate_shared_memory(gl.int32, [_STAGES, _BLOCK // 4, 4, _WORDS], _TILE)
    grads = gl.allocate_shared_memory(gl.int32, [_STAGES, _BLOCK // 4, 4, _WORDS], _TILE)
    loaded = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    found_gate = gl.allocate_shared_memory(gl.int32, [_PARTS, _BLOCK], FOUND)
    found_up = gl.allocate_shared_memory(gl.int32, [_PARTS, _BLOCK], FOUND)
    found_columns = gl.allocate_shared_memory(gl.int32, [_PARTS, _WORDS], FOUND)
    found_sums = gl.allocate_shared_memory(gl.float32, [_PARTS, _BLOCK], FOUND)
    by_gate = gl.allocate_shared_memory(gl.float32, [_BLOCK], _RECIPROCALS)
    by_up = gl.allocate_shared_memory(gl.float32, [_BLOCK], _RECIPROCALS)
    by_weight = gl.allocate_shared_memory(gl.float32, [_BLOCK], _RECIPROCALS)
    by_low = gl.allocate_shared_memory(gl.float32, [_WORDS], _RECIPROCALS)
    by_high = gl.allocate_shared_memory(gl.float32, [_WORDS], _RECIPROCALS)
    for number in gl.static_range(_STAGES):
        mbarrier.init(loaded.index(number), count=1)
    fence_async_shared()
    memory = gates, ups, grads, loaded
    programs, num_tiles = gl.num_programs(0), gl.load(listed) * COLUMN_BLOCKS
    tile = gl.program_id(0)
    first_row, end = _find_tile(listed, tile, num_tiles, COLUMN_BLOCKS)
    next_row, next_end = _find_tile(listed, tile + programs, num_tiles, COLUMN_BLOCKS)
    _load_tile(h, grad, memory, 0, first_row, end, tile, num_tiles, COLUMN_BLOCKS)
    _load_tile(h, grad, memory, 1, next_row, next_end, tile + programs, num_tiles, COLUMN_BLOCKS)
    row = gl.arange(0, _BLOCK, layout=gl.SliceLayout(0, FOUND_LAYOUT))
    slot = gl.load(row_to_slot + first_row + row, mask=first_row + row < end, other=0)
    by_weight.store(gl.load(weights + slot, mask=first_row + row < end, other=0.0).to(gl.float32))
    for step in range((num_tiles - tile + programs - 1) // programs):
        tile = gl.program_id(0) + step * programs
        stage = step % _STAGES
        mbarrier.wait(loaded.index(stage), (step // _STAGES) & 1)
        of_gate, of_up, of_a, row_sums = _differentiate(
            gates.index(stage), ups.index(stage), grads.index(stage), by_weight
        )
        # loaded here, where registers are free, and used after the largest magnitudes are found
        first_row, end = _find_tile(listed, tile, num_tiles, COLUMN_BLOCKS)
        later = tile + _STAGES * programs
        later_row, later_end = _find_tile(listed, later, num_tiles, COLUMN_BLOCKS)
        slot = gl.load(row_to_slot + next_row + row, mask=next_row + row < next_end, other=0)
        leave_rows(found_gate, of_gate)
        leave_rows(found_up, of_up)
        leave_columns(found_columns, of_a)
        found_sums.store(of_warps(row_sums))
        end -= first_row  # from here on, rows count from the first one of the block
        block, column_block = tile // COLUMN_BLOCKS, tile % COLUMN_BLOCKS
        first_column = block.to(gl.int64) * INTER
        turned_scale = turned_h_scales + 2 * COLUMN_BLOCKS * block + column_block
        row_scales = scales + column_block * num_rows + first_row
        scales_of_columns(found_columns, by_low, by_high, turned_a_scales + first_column, column_block, INTER, _LARGEST)
        gate_block = scales_of_rows(found_gate, by_gate, row_scales, turned_scale, end, LARGEST)
        row_scales += COLUMN_BLOCKS * num_rows
        turned_scale += COLUMN_BLOCKS
        up_block = scales_of_rows(found_up, by_up, row_scales, turned_scale, end, LARGEST)
        store_sums(found_sums, sums + column_block * num_rows + first_row, end)
        _load_tile(h, grad, memory, stage, later_row, later_end, later, num_tiles, COLUMN_BLOCKS)
        weight = gl.load(weights + slot, mask=next_row + row < next_end, other=0.0)
        low, high = apart(of_a, True)
        column = column_block * _BLOCK + 2 * words_of_tile(_WORDS, LAYOUT)
        target = turned_a + first_column * _BLOCK
        COLUMNS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))
        store_columns(target, low * by_low.load(COLUMNS)[None, None, :], 0, column, INTER, LAYOUT)
        store_columns(target, high * by_high.load(COLUMNS)[None, None, :], 0, column + 1, INTER, LAYOUT)
        target = turned_h + first_column * (2 * _BLOCK)
        of_rows = values + first_row.to(gl.int64) * (2 * PART)
        _store(of_rows, target, of_gate, by_gate, gate_block, end, column_block, INTER, PART)
        target += INTER * _BLOCK
        _store(of_rows + PART, target, of_up, by_up, up_block, end, column_block, INTER, PART)
        by_weight.store(weight.to(gl.float32))
        next_row, next_end = later_row, later_end
