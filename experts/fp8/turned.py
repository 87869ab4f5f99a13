"""Quantise rows for the gradients of weights, which are sums over rows: transposed, with scales along the rows.

Each expert's rows are cut into blocks of 128, and the last block of an expert is filled up with zeros. The blocks of
all experts follow each other. So in the transposed rows, the reduction of a gradient lies contiguous in memory, as
tensor cores need it for FP8.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.fp8.blocks import BLOCK, E4M3, num_blocks
from experts.fp8.rounding import apart, four_bytes, interpreted, largest, largest_of, reciprocal, scale_of
from experts.gemm.gradients import runs_on_hopper
from experts.gemm.kernels import TILE_FIELDS, find_groups
from experts.gemm.lists import list_of_tiles, most_tiles
from experts.steps import Permutation
from experts.steps.fused.launch import launch

_BLOCK = tl.constexpr(BLOCK)
#: Blocks of columns per program, its warps, and the registers of a thread that let two programs run at a time.
BLOCKS_AT_ONCE, WARPS, REGISTERS = 4, 8, 128


@dataclass(frozen=True)
class RowBlocks:
    """The blocks of 128 rows of each expert. `most` is their largest possible number, B."""

    listed: Tensor  # int32: the number of blocks, then expert, 0, first row and end of the group of each block
    ends_L: Tensor  # int32 [L], the end of each expert's blocks
    most: int


@dataclass(frozen=True)
class TurnedRows:
    """Columns [B, C, 128] in FP8, for the blocks of 128 rows of a `RowBlocks`.

    The scales are [B, C], one for 128 rows of a column, or [B, blocks of C], one for 128 rows of 128 columns.
    """

    values: Tensor
    scales: Tensor


def row_blocks(permutation: Permutation) -> RowBlocks:
    """Return the blocks of rows of a permutation. The host does not wait for their number."""
    offsets_L = permutation.offsets_L
    (experts,) = offsets_L.shape
    ends_L = torch.empty(experts, dtype=torch.int32, device=offsets_L.device)
    launch(count_blocks, (1,), offsets_L, ends_L, EXPERTS=experts, BINS=triton.next_power_of_2(experts))
    return RowBlocks(list_of_tiles(permutation, BLOCK), ends_L, most_tiles(permutation, BLOCK))


def turn(
    rows: Tensor,
    blocks: RowBlocks,
    permutation: Permutation,
    gather: bool,
    by_column: bool,
    halves: int = 1,
    columns: slice = slice(None),
    dtype: torch.dtype = E4M3,
) -> TurnedRows:
    """Return rows [N, C], or with `gather` the tokens [T, C] of the rows, transposed in FP8.

    With `by_column`, each column has scales of its own, otherwise each block of 128 columns. `halves` is the number of
    parts of C that have blocks of their own. `columns` selects some of the columns. Blocks after the last one of the
    last expert stay unwritten.
    """
    rows = rows.contiguous()
    start, stop, _ = columns.indices(rows.shape[1])
    width = stop - start
    num_columns = halves * num_blocks(width // halves)
    values = torch.empty(blocks.most, width, BLOCK, dtype=dtype, device=rows.device)
    scales = torch.empty(blocks.most, width if by_column else num_columns, dtype=torch.float32, device=rows.device)
    if blocks.most == 0:
        return TurnedRows(values, scales)
    if runs_on_hopper(rows.device, permutation.num_rows):
        from experts.fp8 import hopper

        hopper.turn(rows, values, scales, blocks.listed, permutation, gather, by_column, halves, start)
        return TurnedRows(values, scales)
    launch(
        turn_rows,
        (blocks.most * triton.cdiv(num_columns, BLOCKS_AT_ONCE),),
        *(rows.view(torch.uint32), values.view(torch.int32), scales, blocks.listed, permutation.row_to_slot_N),
        *(rows.shape[1] // 2, start // 2, blocks.most, width // halves // 2),
        HALVES=halves,
        K=permutation.n_activated_experts,
        GATHER=gather,
        BY_COLUMN=by_column,
        BF16=rows.dtype is torch.bfloat16,
        LARGEST=largest(dtype),
        EXACT=interpreted(),
        AT_ONCE=BLOCKS_AT_ONCE,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
    return TurnedRows(values, scales)


@triton.jit
def count_blocks(offsets, ends, EXPERTS: tl.constexpr, BINS: tl.constexpr):
    """Write the end of each expert's blocks of 128 rows."""
    bins, _, _, blocks = find_groups(offsets, EXPERTS, BINS, _BLOCK)
    tl.store(ends + bins, tl.cumsum(blocks, 0), mask=bins < EXPERTS)


@triton.jit
def _store_columns(values, words, first, column, inside):
    """Store words of four rows as columns of `values`. A block's columns begin at column `first` of all blocks."""
    target = (first + column)[:, None] * (_BLOCK // 4) + tl.arange(0, _BLOCK // 4)[None, :]
    tl.store(values + target, tl.trans(words), mask=inside[:, None])


@triton.jit
def _addresses(rows, row_to_slot, row, end, stride, K: tl.constexpr, GATHER: tl.constexpr):
    source = row.to(tl.int64)
    if GATHER:
        source = tl.load(row_to_slot + row, mask=row < end, other=0) // K
    return rows + source[:, None] * stride


@triton.jit
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
    HALVES: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BF16: tl.constexpr,
    LARGEST: tl.constexpr,
    EXACT: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Quantise AT_ONCE blocks of columns of a block of rows.

    `rows` are words of two columns, and so are the units of `row_stride`, `start` and `part_width`. `values` are words
    of four rows; see `four_bytes`.
    """
    column_blocks = tl.cdiv(part_width, _BLOCK // 2)
    program = tl.program_id(0)
    if GATHER:  # several rows read the same token: all rows of some columns first
        block, stretch = program % most_blocks, program // most_blocks
    else:
        stretches = tl.cdiv(HALVES * column_blocks, AT_ONCE)
        block, stretch = program // stretches, program % stretches
    entry = listed + (1 + block) * TILE_FIELDS
    first_row, end = tl.load(entry + 2), tl.load(entry + 3)  # before the test, so that no load waits for another
    if block >= tl.load(listed):
        return
    row = first_row + 4 * tl.arange(0, _BLOCK // 4)
    source_0 = _addresses(rows, row_to_slot, row, end, row_stride, K, GATHER)
    source_1 = _addresses(rows, row_to_slot, row + 1, end, row_stride, K, GATHER)
    source_2 = _addresses(rows, row_to_slot, row + 2, end, row_stride, K, GATHER)
    source_3 = _addresses(rows, row_to_slot, row + 3, end, row_stride, K, GATHER)
    first_block = stretch * AT_ONCE
    first_column = block.to(tl.int64) * (2 * HALVES * part_width)
    for column_block in range(first_block, tl.minimum(first_block + AT_ONCE, HALVES * column_blocks)):
        in_part = column_block % column_blocks * (_BLOCK // 2) + tl.arange(0, _BLOCK // 2)
        inside = in_part < part_width
        pair = column_block // column_blocks * part_width + in_part
        where, mask = start + pair[None, :], inside[None, :]
        words_0 = tl.load(source_0 + where, mask=(row < end)[:, None] & mask, other=0)
        words_1 = tl.load(source_1 + where, mask=(row + 1 < end)[:, None] & mask, other=0)
        words_2 = tl.load(source_2 + where, mask=(row + 2 < end)[:, None] & mask, other=0)
        words_3 = tl.load(source_3 + where, mask=(row + 3 < end)[:, None] & mask, other=0)
        left_0, right_0 = apart(words_0, BF16)
        left_1, right_1 = apart(words_1, BF16)
        left_2, right_2 = apart(words_2, BF16)
        left_3, right_3 = apart(words_3, BF16)
        left = largest_of(left_0, left_1, left_2, left_3)
        right = largest_of(right_0, right_1, right_2, right_3)
        if BY_COLUMN:
            left, right = scale_of(left, LARGEST), scale_of(right, LARGEST)
            target = scales + first_column + 2 * pair
            tl.store(target, left, mask=inside)
            tl.store(target + 1, right, mask=inside)
            left, right = reciprocal(left)[None, :], reciprocal(right)[None, :]
        else:
            scale = scale_of(tl.max(tl.maximum(left, right), axis=0), LARGEST)
            tl.store(scales + block * (HALVES * column_blocks) + column_block, scale)
            left = reciprocal(scale)
            right = left
        words = four_bytes(left_0 * left, left_1 * left, left_2 * left, left_3 * left, LARGEST, EXACT)
        _store_columns(values, words, first_column, 2 * pair, inside)
        words = four_bytes(right_0 * right, right_1 * right, right_2 * right, right_3 * right, LARGEST, EXACT)
        _store_columns(values, words, first_column, 2 * pair + 1, inside)
