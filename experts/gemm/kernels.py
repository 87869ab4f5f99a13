"""Define the Triton kernels that `experts.gemm.products` launches."""

import triton
import triton.language as tl

from experts.steps.fused.tiles import glu

#: The list of tiles has four numbers per tile: expert, tile of columns, first row, end of the expert's group.
TILE_FIELDS = tl.constexpr(4)
_TILES_AT_ONCE = tl.constexpr(128)


@triton.jit
def find_groups(offsets, EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr):
    """Return BINS bins, one per expert, and the start, end and number of blocks of rows of each bin's group."""
    bins = tl.arange(0, BINS)
    ends = tl.load(offsets + bins, mask=bins < EXPERTS, other=0)
    starts = tl.load(offsets + bins - 1, mask=(bins > 0) & (bins < EXPERTS), other=0)
    return bins, starts, ends, tl.cdiv(ends - starts, ROWS)


@triton.jit
def find_tile(
    offsets,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    MOST: tl.constexpr,
):
    """Return this program's expert, tile of columns and first row, and the end of the expert's group.

    If the program has no tile, the returned expert is EXPERTS or more. Experts with more blocks than MOST have no
    tiles, unless MOST is 0.
    """
    tile = tl.program_id(0)
    bins, starts, ends, blocks = find_groups(offsets, EXPERTS, BINS, ROWS)
    if MOST > 0:
        blocks = tl.where(blocks > MOST, 0, blocks)
    blocks_up_to = tl.cumsum(blocks, 0)
    block = tile // COLUMN_TILES
    expert = tl.sum((blocks_up_to <= block).to(tl.int32), 0)
    own = bins == expert
    tile -= tl.sum(tl.where(own, blocks_up_to - blocks, 0), 0) * COLUMN_TILES
    own_blocks = tl.maximum(tl.sum(tl.where(own, blocks, 0), 0), 1)
    first_row = tl.sum(tl.where(own, starts, 0), 0) + tile % own_blocks * ROWS
    return expert, tile // own_blocks, first_row, tl.sum(tl.where(own, ends, 0), 0)


@triton.jit
def list_tiles(
    offsets,
    tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    OVER: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Write the number of tiles, then the numbers that `find_tile` finds for each tile.

    Each program lists the tiles of one expert. Experts that have no more than OVER rows have no tiles. With SMALL, the
    number of these experts' blocks of SMALL rows is written after the number of tiles.
    """
    expert = tl.program_id(0)
    bins, starts, ends, blocks = find_groups(offsets, EXPERTS, BINS, ROWS)
    blocks = tl.where(ends - starts > OVER, blocks, 0)
    if expert == 0:
        tl.store(tiles, tl.sum(blocks, 0) * COLUMN_TILES)
        if SMALL > 0:
            tl.store(tiles + 1, tl.sum(tl.where(ends - starts > OVER, 0, tl.cdiv(ends - starts, SMALL)), 0))
    own = bins == expert
    own_blocks = tl.sum(tl.where(own, blocks, 0), 0)
    start, end = tl.sum(tl.where(own, starts, 0), 0), tl.sum(tl.where(own, ends, 0), 0)
    tiles += (1 + tl.sum(tl.where(bins < expert, blocks, 0), 0) * COLUMN_TILES) * TILE_FIELDS
    for first in range(0, own_blocks * COLUMN_TILES, _TILES_AT_ONCE):
        tile = first + tl.arange(0, _TILES_AT_ONCE)
        listed = tile < own_blocks * COLUMN_TILES
        entry = tiles + tile * TILE_FIELDS
        tl.store(entry, tl.full([_TILES_AT_ONCE], 0, tl.int32) + expert, mask=listed)
        tl.store(entry + 1, tile // own_blocks, mask=listed)
        tl.store(entry + 2, start + tile % own_blocks * ROWS, mask=listed)
        tl.store(entry + 3, tl.full([_TILES_AT_ONCE], 0, tl.int32) + end, mask=listed)


@triton.jit
def _load_bias(bias, expert, columns, width: tl.constexpr):
    """Return a row of the expert's bias in float32.

    With gate and up in halves, columns past the end of a half read values of the other half. `_store` does not store
    these columns.
    """
    return tl.load(bias + expert.to(tl.int64) * width + columns, mask=columns < width, other=0.0).to(tl.float32)[
        None, :
    ]


@triton.jit
def load_weights(b, expert, depth, column, STEP: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return a tile [STEP, COLUMNS] of the expert's matrix, or of its transpose."""
    if TRANSPOSED:
        return b.load([expert, column, depth]).reshape(COLUMNS, STEP).T
    return b.load([expert, depth, column]).reshape(STEP, COLUMNS)


@triton.jit
def _store(out, tile, row, valid, columns, WIDTH: tl.constexpr):
    where = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(out + where, tile.to(out.dtype.element_ty), mask=valid[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def grouped_gemm(
    a,
    b,
    out,
    bias,
    weights,
    row_to_slot,
    offsets,
    tiles,
    alpha,
    limit,
    offset,
    EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    LISTED: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATE: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GELU: tl.constexpr,
    LIMITED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIAS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    MOST: tl.constexpr,
):
    """Multiply the rows of experts that have at most MOST tiles of rows; see `find_tile`.

    `tiles` is the list of tiles with LISTED. Else it is None, or the list for the experts with more than MOST tiles.
    """
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    READ: tl.constexpr = 2 * COLUMNS if INTERLEAVED else COLUMNS
    # Load the next tile's first operands while this tile is stored. On an H200 (2026-11) the overlap made the kernel
    # 1.1 times as fast for rows in permuted order, but 0.75 times as fast for gathered rows.
    OVERLAP: tl.constexpr = LISTED and not GATHER
    if LISTED:
        num_tiles = tl.load(tiles)
    else:
        if tiles is not None and tl.program_id(0) >= tl.load(tiles + 1) * tl.cdiv(WIDTH, COLUMNS):
            return  # `find_tile` would take longer to find no tile
        expert, column_tile, first_row, end = find_tile(offsets, EXPERTS, BINS, ROWS, tl.cdiv(WIDTH, COLUMNS), MOST)
        if expert >= EXPERTS:
            return
        num_tiles = tl.num_programs(0)  # one tile per program
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=OVERLAP):
        if LISTED:
            entry = tiles + (1 + tile) * TILE_FIELDS
            expert, column_tile = tl.load(entry), tl.load(entry + 1)
            first_row, end = tl.load(entry + 2), tl.load(entry + 3)
        row = first_row + tl.arange(0, ROWS)
        valid = row < end
        if GATHER or WEIGHTS:
            slot = tl.load(row_to_slot + row, mask=valid, other=0)
        if GATHER:
            token_row = a + (slot // K)[:, None] * DEPTH + tl.arange(0, STEP)[None, :]
        sums = tl.zeros([ROWS, READ], dtype=tl.float32)
        if HALVES:
            up_sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, DEPTH, STEP):
            if not GATHER:
                a_tile = a.load([first_row, start])
            else:
                inside = valid[:, None] & (start + tl.arange(0, STEP) < DEPTH)[None, :]
                a_tile = tl.load(token_row + start, mask=inside, other=0.0)
            b_tile = load_weights(b, expert, start, column_tile * READ, STEP, READ, TRANSPOSED)
            sums = tl.dot(a_tile, b_tile, sums)
            if HALVES:
                up_tile = load_weights(b, expert, start, WIDTH + column_tile * READ, STEP, READ, TRANSPOSED)
                up_sums = tl.dot(a_tile, up_tile, up_sums)

        columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        if INTERLEAVED:
            if BIAS:
                sums += _load_bias(bias, expert, column_tile * READ + tl.arange(0, READ), 2 * WIDTH)
            sums, up_sums = tl.split(tl.reshape(sums, [ROWS, COLUMNS, 2]))
        elif BIAS:
            sums += _load_bias(bias, expert, columns, 2 * WIDTH if GATED else WIDTH)
            if GATED:
                up_sums += _load_bias(bias, expert, WIDTH + columns, 2 * WIDTH)
        if GATED:
            value, _, _ = glu(sums, up_sums, alpha, limit, offset, GELU, LIMITED)
        elif ACTIVATE:
            rectified = tl.where(sums < 0, 0.0, sums)
            value = rectified * rectified
        else:
            value = sums
        if WEIGHTS:
            value *= tl.load(weights + slot, mask=valid, other=0.0).to(tl.float32)[:, None]
        if OVERLAP:  # storing half a tile at a time takes half the shared memory
            left, right = tl.split(tl.permute(tl.reshape(value, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))
            half = column_tile * COLUMNS + tl.arange(0, COLUMNS // 2)
            _store(out, left, row, valid, half, WIDTH)
            _store(out, right, row, valid, half + COLUMNS // 2, WIDTH)
        else:
            _store(out, value, row, valid, columns, WIDTH)
