"""Multiply rows, in permuted order or gathered from tokens, by their experts' matrices. Eight warps multiply.

The programs go through the list of tiles of `experts.gemm.products`. The TMA copies the matrices, the result, and rows
in permuted order. For these rows, one warp loads. The rows of tokens are gathered by four warps, 16 bytes a thread. A
tile is stored while tensor cores multiply the first step of the next tile. On an H200 (2026-11-30), tensor cores were
idle for about 3,000 cycles a tile without this overlap: 5% of the time with 64 steps a tile, and 20% with 12.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from experts.gemm.hopper.descriptors import MOST_ROWS, aligned, described, grouped_rows
from experts.gemm.hopper.rounding import rounded
from experts.gemm.kernels import TILE_FIELDS
from experts.gemm.tiling import LARGE
from experts.steps import Permutation
from experts.steps.fused.launch import launch


def product(
    a: Tensor,
    b_LPQ: Tensor,
    permutation: Permutation,
    tiles: Tensor,
    programs: int,
    gather: bool,
    transposed: bool,
) -> Tensor:
    """Return [N, Q]: each row of a times its expert's matrix of b [L, P, Q], or its transpose of b [L, Q, P].

    a: [T, P] with `gather`, whose rows are the rows' tokens; else [N, P]. Both have the same 16-bit dtype. The tiles
    are those of `experts.gemm.products`, of `LARGE`. Rows past the last group stay unwritten. Sums are in float32.
    """
    a, b_LPQ = aligned(a), aligned(b_LPQ)
    width, depth = b_LPQ.shape[1:] if transposed else b_LPQ.shape[:0:-1]
    out = torch.empty(permutation.num_rows, width, dtype=a.dtype, device=a.device)
    launch(
        multiply_rows,
        (programs,),
        a if gather else described(a, [LARGE.rows, LARGE.depth]),
        described(b_LPQ, [1, LARGE.columns, LARGE.depth] if transposed else [1, LARGE.depth, LARGE.columns]),
        grouped_rows(out, [LARGE.rows, LARGE.columns]),
        permutation.row_to_slot_N,
        tiles,
        DEPTH=depth,
        K=permutation.n_activated_experts,
        GATHER=gather,
        TRANSPOSED=transposed,
        num_warps=LARGE.warps,
    )
    return out


_ROWS, _COLUMNS = gl.constexpr(LARGE.rows), gl.constexpr(LARGE.columns)
_STEP, _STAGES = gl.constexpr(LARGE.depth), gl.constexpr(LARGE.stages)
_GATHERING_WARPS, _GATHERING_REGISTERS = gl.constexpr(4), gl.constexpr(64)


@gluon.jit
def _read_tile(tiles, tile):
    """Return a tile's expert, tile of columns, first row, and the end of the expert's group."""
    entry = tiles + (1 + tile) * TILE_FIELDS
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def _load_weights(b, b_tiles, stage, barrier, expert, column, depth, TRANSPOSED: gl.constexpr):
    if TRANSPOSED:
        block = b_tiles.index(stage)._reinterpret(b.dtype, [1, _COLUMNS, _STEP], b.layout)
        tma.async_copy_global_to_shared(b, [expert, column, depth], barrier, block)
    else:
        block = b_tiles.index(stage)._reinterpret(b.dtype, [1, _STEP, _COLUMNS], b.layout)
        tma.async_copy_global_to_shared(b, [expert, depth, column], barrier, block)


@gluon.jit
def _load(a, b, tiles, a_tiles, b_tiles, loaded, free, DEPTH: gl.constexpr, TRANSPOSED: gl.constexpr):
    num_tiles = gl.load(tiles)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, column_tile, first_row, _ = _read_tile(tiles, tile)
        for depth in range(0, DEPTH, _STEP):
            stage = step % _STAGES
            barrier = loaded.index(stage)
            mbarrier.wait(free.index(stage), ((step // _STAGES) & 1) ^ 1)
            mbarrier.expect(barrier, a.block_type.nbytes + b.block_type.nbytes)
            tma.async_copy_global_to_shared(a, [first_row, depth], barrier, a_tiles.index(stage))
            _load_weights(b, b_tiles, stage, barrier, expert, column_tile * _COLUMNS, depth, TRANSPOSED)
            step += 1


@gluon.jit
def _find_sources(row_to_slot, tiles, tile, num_tiles, rows, K: gl.constexpr):
    """Return the token of each row of a tile, and which rows belong to the tile's expert: none after the last tile."""
    entry = tiles + (1 + tile) * TILE_FIELDS
    first_row = gl.load(entry + 2, mask=tile < num_tiles, other=0)
    valid = first_row + rows < gl.load(entry + 3, mask=tile < num_tiles, other=0)
    return gl.load(row_to_slot + first_row + rows, mask=valid, other=0).to(gl.int32) // K, valid


@gluon.jit
def _load_gathered(
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
):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // _STEP, _STEP // 8], [_GATHERING_WARPS, 1], [1, 0])
    rows = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, _STEP, layout=gl.SliceLayout(0, layout))
    num_tiles = gl.load(tiles)
    step = 0
    source, valid = _find_sources(row_to_slot, tiles, gl.program_id(0), num_tiles, rows, K)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, column_tile, _, _ = _read_tile(tiles, tile)
        where = a + (source.to(gl.int64) * DEPTH)[:, None] + columns[None, :]
        inside = valid
        # early: the next tile waits for them
        source, valid = _find_sources(row_to_slot, tiles, tile + gl.num_programs(0), num_tiles, rows, K)
        for depth in range(0, DEPTH, _STEP):
            stage = step % _STAGES
            barrier = loaded.index(stage)
            mbarrier.wait(free.index(stage), ((step // _STAGES) & 1) ^ 1)
            mbarrier.expect(barrier, b.block_type.nbytes)
            _load_weights(b, b_tiles, stage, barrier, expert, column_tile * _COLUMNS, depth, TRANSPOSED)
            mask = inside[:, None] & (depth + columns < DEPTH)[None, :]  # what is masked becomes zero
            async_copy.async_copy_global_to_shared(a_tiles.index(stage), where + depth, mask=mask)
            async_copy.mbarrier_arrive(barrier, increment_count=False)
            step += 1


@gluon.jit
def _store(out, result, values, first_row, end, column):
    tma.store_wait(0)  # the tile before has left the memory of the result
    result.store(values)
    fence_async_shared()
    block = result._reinterpret(out.dtype, [1, 1, _ROWS, _COLUMNS], out.layout)
    tma.async_copy_shared_to_global(out, [MOST_ROWS, end, MOST_ROWS - end + first_row, column], block)


@gluon.jit
def _multiply_step(
    sums, step, a_tiles, b_tiles, loaded, GATHER: gl.constexpr, TRANSPOSED: gl.constexpr, FIRST: gl.constexpr
):
    stage = step % _STAGES
    mbarrier.wait(loaded.index(stage), (step // _STAGES) & 1)
    if GATHER:
        fence_async_shared()  # tensor cores read what the loading warps wrote
    b_tile = b_tiles.index(stage).permute((1, 0)) if TRANSPOSED else b_tiles.index(stage)
    return warpgroup_mma(a_tiles.index(stage), b_tile, sums, use_acc=not FIRST, is_async=True)


@gluon.jit
def _multiply(
    out,
    tiles,
    a_tiles,
    b_tiles,
    result,
    loaded,
    free,
    DEPTH: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, _COLUMNS, 16])
    num_tiles = gl.load(tiles)
    step = 0
    # A tile is stored while the first step of the next tile is multiplied. Before the first tile, nothing is stored.
    done = gl.zeros([_ROWS, _COLUMNS], out.dtype, layout)
    done_row, done_end, done_column = 0, 0, 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        sums = gl.zeros([_ROWS, _COLUMNS], gl.float32, layout)
        sums = _multiply_step(sums, step, a_tiles, b_tiles, loaded, GATHER, TRANSPOSED, True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        step += 1
        _store(out, result, done, done_row, done_end, done_column)
        _, column_tile, done_row, done_end = _read_tile(tiles, tile)
        done_column = column_tile * _COLUMNS
        for _ in range(_STEP, DEPTH, _STEP):
            sums = _multiply_step(sums, step, a_tiles, b_tiles, loaded, GATHER, TRANSPOSED, False)
            sums = warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
            step += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
        done = rounded(sums, out.dtype)
    _store(out, result, done, done_row, done_end, done_column)
    tma.store_wait(0)


@gluon.jit
def multiply_rows(
    a,
    b,
    out,
    row_to_slot,
    tiles,
    DEPTH: gl.constexpr,
    K: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = b.dtype
    A_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _STEP], dtype)
    a_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _ROWS, _STEP], A_LAYOUT)
    if TRANSPOSED:
        TURNED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_COLUMNS, _STEP], dtype)
        b_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _COLUMNS, _STEP], TURNED)
    else:
        STRAIGHT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_STEP, _COLUMNS], dtype)
        b_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _STEP, _COLUMNS], STRAIGHT)
    OUT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _COLUMNS], dtype)
    result = gl.allocate_shared_memory(dtype, [_ROWS, _COLUMNS], OUT_LAYOUT)
    loaded = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(loaded.index(stage), count=1 + 32 * _GATHERING_WARPS if GATHER else 1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    if GATHER:
        gl.warp_specialize(
            [
                (_multiply, (out, tiles, a_tiles, b_tiles, result, loaded, free, DEPTH, GATHER, TRANSPOSED, num_warps)),
                (
                    _load_gathered,
                    (a, b, row_to_slot, tiles, a_tiles, b_tiles, loaded, free, DEPTH, K, TRANSPOSED),
                ),
            ],
            [_GATHERING_WARPS],
            [_GATHERING_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (out, tiles, a_tiles, b_tiles, result, loaded, free, DEPTH, GATHER, TRANSPOSED, num_warps)),
                (_load, (a, b, tiles, a_tiles, b_tiles, loaded, free, DEPTH, TRANSPOSED)),
            ],
            [1],
            [24],
        )
