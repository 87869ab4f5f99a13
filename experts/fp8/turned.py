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
from experts.fp8.quantise import interpreted, largest, reciprocal, scale_of, to_fp8
from experts.gemm.kernels import TILE_FIELDS, list_tiles
from experts.steps import Permutation
from experts.steps.fused.launch import launch

_BLOCK = tl.constexpr(BLOCK)
WARPS = 8


@dataclass(frozen=True)
class RowBlocks:
    """The blocks of 128 rows of each expert. `most` is their largest possible number, B."""

    listed: Tensor  # int32: the number of blocks, then expert, 0, first row and end of the group of each block
    ends_L: Tensor  # int32 [L], the end of each expert's blocks
    most: int


@dataclass(frozen=True)
class TurnedRows:
    """Columns [C, B · 128] in FP8, in the blocks of rows of a `RowBlocks`.

    The scales are [B, C], one for 128 rows of a column, or [B, blocks of C], one for 128 rows of 128 columns.
    """

    values: Tensor
    scales: Tensor


def row_blocks(permutation: Permutation) -> RowBlocks:
    """Return the blocks of rows of a permutation. The host does not wait for their number."""
    offsets_L = permutation.offsets_L
    experts, num_rows = offsets_L.shape[0], permutation.num_rows
    most = num_rows // BLOCK + min(experts, num_rows)
    listed = torch.empty((1 + most) * TILE_FIELDS.value, dtype=torch.int32, device=offsets_L.device)
    bins = triton.next_power_of_2(experts)
    launch(list_tiles, (experts,), offsets_L, listed, EXPERTS=experts, BINS=bins, ROWS=BLOCK, COLUMN_TILES=1)
    counts_L = torch.diff(offsets_L, prepend=offsets_L.new_zeros(1))
    return RowBlocks(listed, ((counts_L + BLOCK - 1) // BLOCK).cumsum(0, dtype=torch.int32), most)


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
    values = torch.empty(width, blocks.most * BLOCK, dtype=dtype, device=rows.device)
    scales = torch.empty(blocks.most, width if by_column else num_columns, dtype=torch.float32, device=rows.device)
    launch(
        turn_rows,
        (blocks.most, num_columns),
        *(
            rows,
            values,
            scales,
            blocks.listed,
            permutation.row_to_slot_N,
            rows.stride(0),
            start,
            blocks.most,
            width // halves,
        ),
        HALVES=halves,
        K=permutation.n_activated_experts,
        GATHER=gather,
        BY_COLUMN=by_column,
        LARGEST=largest(dtype),
        EXACT=interpreted(),
        num_warps=WARPS,
    )
    return TurnedRows(values, scales)


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
    LARGEST: tl.constexpr,
    EXACT: tl.constexpr,
):
    block = tl.program_id(0)
    if block >= tl.load(listed):
        return
    first_row, end = tl.load(listed + (1 + block) * TILE_FIELDS + 2), tl.load(listed + (1 + block) * TILE_FIELDS + 3)
    row = first_row + tl.arange(0, _BLOCK)
    valid = row < end
    source = row.to(tl.int64)
    if GATHER:
        source = tl.load(row_to_slot + row, mask=valid, other=0) // K
    column_blocks = tl.cdiv(part_width, _BLOCK)
    column_block = tl.program_id(1)
    part = column_block // column_blocks
    in_part = column_block % column_blocks * _BLOCK + tl.arange(0, _BLOCK)
    inside = in_part < part_width
    column = part * part_width + in_part
    where = source[:, None] * row_stride + start + column[None, :]
    tile = tl.load(rows + where, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
    most = tl.max(tl.abs(tile), axis=0)
    if BY_COLUMN:
        scale = scale_of(most, LARGEST)
        tl.store(scales + block.to(tl.int64) * (HALVES * part_width) + column, scale, mask=inside)
        tile = tile * reciprocal(scale)[None, :]
    else:
        scale = scale_of(tl.max(most, axis=0), LARGEST)
        tl.store(scales + block * (HALVES * column_blocks) + column_block, scale)
        tile = tile * reciprocal(scale)
    turned = tl.trans(to_fp8(tile, LARGEST, EXACT).to(values.dtype.element_ty))
    target = column.to(tl.int64)[:, None] * (most_blocks * _BLOCK) + block * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    tl.store(values + target, turned, mask=inside[:, None])
