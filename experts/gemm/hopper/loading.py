"""Load the operands of `experts.gemm.hopper.rows`: one warp for rows in permuted order, four for rows of tokens."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from experts.gemm.kernels import TILE_FIELDS
from experts.gemm.tiling import LARGE

_ROWS, _COLUMNS = gl.constexpr(LARGE.rows), gl.constexpr(LARGE.columns)
_STEP, _STAGES = gl.constexpr(LARGE.depth), gl.constexpr(LARGE.stages)
GATHERING_WARPS, GATHERING_REGISTERS = gl.constexpr(4), gl.constexpr(64)


@gluon.jit
def read_tile(tiles, tile):
    """Return a tile's expert, tile of columns, first row, and the end of the expert's group."""
    entry = tiles + (1 + tile) * TILE_FIELDS
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def _load_weights(
    b, b_tiles, stage, barrier, expert, column_tile, depth, TRANSPOSED: gl.constexpr, PAIRS: gl.constexpr
):
    """Load a step of a tile's weights; with PAIRS, 64 columns of gate, the same of up, then the next 64 of both."""
    if PAIRS:
        block = b_tiles.index(stage)._reinterpret(b.dtype, [1, 2, _STEP, _COLUMNS // 2], b.layout)
        tma.async_copy_global_to_shared(b, [expert, 0, depth, column_tile * (_COLUMNS // 2)], barrier, block)
    elif TRANSPOSED:
        block = b_tiles.index(stage)._reinterpret(b.dtype, [1, _COLUMNS, _STEP], b.layout)
        tma.async_copy_global_to_shared(b, [expert, column_tile * _COLUMNS, depth], barrier, block)
    else:
        block = b_tiles.index(stage)._reinterpret(b.dtype, [1, _STEP, _COLUMNS], b.layout)
        tma.async_copy_global_to_shared(b, [expert, depth, column_tile * _COLUMNS], barrier, block)


@gluon.jit
def load_rows(
    a, b, tiles, a_tiles, b_tiles, loaded, free, DEPTH: gl.constexpr, TRANSPOSED: gl.constexpr, PAIRS: gl.constexpr
):
    num_tiles = gl.load(tiles)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, column_tile, first_row, _ = read_tile(tiles, tile)
        for depth in range(0, DEPTH, _STEP):
            stage = step % _STAGES
            barrier = loaded.index(stage)
            mbarrier.wait(free.index(stage), ((step // _STAGES) & 1) ^ 1)
            mbarrier.expect(barrier, a.block_type.nbytes + b.block_type.nbytes)
            tma.async_copy_global_to_shared(a, [first_row, depth], barrier, a_tiles.index(stage))
            _load_weights(b, b_tiles, stage, barrier, expert, column_tile, depth, TRANSPOSED, PAIRS)
            step += 1


@gluon.jit
def find_sources(row_to_slot, tiles, tile, num_tiles, rows, K: gl.constexpr):
    """Return the token of each row of a tile, and which rows belong to the tile's expert: none after the last tile."""
    entry = tiles + (1 + tile) * TILE_FIELDS
    first_row = gl.load(entry + 2, mask=tile < num_tiles, other=0)
    valid = first_row + rows < gl.load(entry + 3, mask=tile < num_tiles, other=0)
    return gl.load(row_to_slot + first_row + rows, mask=valid, other=0).to(gl.int32) // K, valid


@gluon.jit
def load_tokens(
    a,
    b,
    row_to_slot,
    tiles,
    a_tiles,
    b_tiles,
    loaded,
    free,
    DEPTH: gl.constexpr,
    K: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    PAIRS: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // _STEP, _STEP // 8], [WARPS, 1], [1, 0])
    rows = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, _STEP, layout=gl.SliceLayout(0, layout))
    num_tiles = gl.load(tiles)
    step = 0
    source, valid = find_sources(row_to_slot, tiles, gl.program_id(0), num_tiles, rows, K)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, column_tile, _, _ = read_tile(tiles, tile)
        where = a + (source.to(gl.int64) * DEPTH)[:, None] + columns[None, :]
        inside = valid
        # early: the next tile waits for them
        source, valid = find_sources(row_to_slot, tiles, tile + gl.num_programs(0), num_tiles, rows, K)
        for depth in range(0, DEPTH, _STEP):
            stage = step % _STAGES
            barrier = loaded.index(stage)
            mbarrier.wait(free.index(stage), ((step // _STAGES) & 1) ^ 1)
            mbarrier.expect(barrier, b.block_type.nbytes)
            _load_weights(b, b_tiles, stage, barrier, expert, column_tile, depth, TRANSPOSED, PAIRS)
            mask = inside[:, None] & (depth + columns < DEPTH)[None, :]  # what is masked becomes zero
            async_copy.async_copy_global_to_shared(a_tiles.index(stage), where + depth, mask=mask)
            async_copy.mbarrier_arrive(barrier, increment_count=False)
            step += 1
