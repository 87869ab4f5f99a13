"""Multiply rows in permuted order by their experts' matrices. One warp loads, eight warps multiply.

The programs go through the list of tiles of `experts.gemm.products`. The TMA copies both operands and the result.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from experts.gemm.hopper.descriptors import MOST_ROWS, aligned, described, grouped_rows
from experts.gemm.kernels import TILE_FIELDS
from experts.gemm.tiling import LARGE
from experts.steps.fused.launch import launch


def product(a_NP: Tensor, b_LPQ: Tensor, tiles: Tensor, programs: int, transposed: bool) -> Tensor:
    """Return [N, Q]: each row of a times its expert's matrix of b [L, P, Q], or its transpose of b [L, Q, P].

    Both have the same 16-bit dtype. The tiles are those of `experts.gemm.products`, of `LARGE`. Rows past the
    last group stay unwritten. Sums are in float32.
    """
    a_NP, b_LPQ = aligned(a_NP), aligned(b_LPQ)
    width, depth = b_LPQ.shape[1:] if transposed else b_LPQ.shape[:0:-1]
    out = torch.empty(a_NP.shape[0], width, dtype=a_NP.dtype, device=a_NP.device)
    launch(
        multiply_rows,
        (programs,),
        described(a_NP, [LARGE.rows, LARGE.depth]),
        described(b_LPQ, [1, LARGE.columns, LARGE.depth] if transposed else [1, LARGE.depth, LARGE.columns]),
        grouped_rows(out, [LARGE.rows, LARGE.columns]),
        tiles,
        DEPTH=depth,
        TRANSPOSED=transposed,
        num_warps=LARGE.warps,
    )
    return out


_ROWS, _COLUMNS = gl.constexpr(LARGE.rows), gl.constexpr(LARGE.columns)
_STEP, _STAGES = gl.constexpr(LARGE.depth), gl.constexpr(LARGE.stages)


@gluon.jit
def _read_tile(tiles, tile):
    """Return a tile's expert, tile of columns, first row, and the end of the expert's group."""
    entry = tiles + (1 + tile) * TILE_FIELDS
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def _load(a, b, tiles, a_tiles, b_tiles, loaded, free, DEPTH: gl.constexpr, TRANSPOSED: gl.constexpr):
    num_tiles = gl.load(tiles)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, column_tile, first_row, _ = _read_tile(tiles, tile)
        column = column_tile * _COLUMNS
        for depth in range(0, DEPTH, _STEP):
            stage = step % _STAGES
            barrier = loaded.index(stage)
            mbarrier.wait(free.index(stage), ((step // _STAGES) & 1) ^ 1)
            mbarrier.expect(barrier, a.block_type.nbytes + b.block_type.nbytes)
            tma.async_copy_global_to_shared(a, [first_row, depth], barrier, a_tiles.index(stage))
            if TRANSPOSED:
                block = b_tiles.index(stage)._reinterpret(b.dtype, [1, _COLUMNS, _STEP], b.layout)
                tma.async_copy_global_to_shared(b, [expert, column, depth], barrier, block)
            else:
                block = b_tiles.index(stage)._reinterpret(b.dtype, [1, _STEP, _COLUMNS], b.layout)
                tma.async_copy_global_to_shared(b, [expert, depth, column], barrier, block)
            step += 1


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
    TRANSPOSED: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, _COLUMNS, 16])
    num_tiles = gl.load(tiles)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _, column_tile, first_row, end = _read_tile(tiles, tile)
        sums = gl.zeros([_ROWS, _COLUMNS], gl.float32, layout)
        for depth in range(0, DEPTH, _STEP):
            stage = step % _STAGES
            mbarrier.wait(loaded.index(stage), (step // _STAGES) & 1)
            b_tile = b_tiles.index(stage).permute((1, 0)) if TRANSPOSED else b_tiles.index(stage)
            sums = warpgroup_mma(a_tiles.index(stage), b_tile, sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES), pred=depth > 0)
            step += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
        tma.store_wait(0)  # the tile before has left the memory of the result
        result.store(sums.to(out.dtype))
        fence_async_shared()
        block = result._reinterpret(out.dtype, [1, 1, _ROWS, _COLUMNS], out.layout)
        tma.async_copy_shared_to_global(
            out, [MOST_ROWS, end, MOST_ROWS - end + first_row, column_tile * _COLUMNS], block
        )
    tma.store_wait(0)


@gluon.jit
def multiply_rows(a, b, out, tiles, DEPTH: gl.constexpr, TRANSPOSED: gl.constexpr, num_warps: gl.constexpr):
    dtype: gl.constexpr = b.dtype
    A_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _STEP], dtype)
    a_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _ROWS, _STEP], A_LAYOUT)
    if TRANSPOSED:
        B_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_COLUMNS, _STEP], dtype)
        b_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _COLUMNS, _STEP], B_LAYOUT)
    else:
        B_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_STEP, _COLUMNS], dtype)
        b_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _STEP, _COLUMNS], B_LAYOUT)
    OUT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _COLUMNS], dtype)
    result = gl.allocate_shared_memory(dtype, [_ROWS, _COLUMNS], OUT_LAYOUT)
    loaded = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (out, tiles, a_tiles, b_tiles, result, loaded, free, DEPTH, TRANSPOSED, num_warps)),
            (_load, (a, b, tiles, a_tiles, b_tiles, loaded, free, DEPTH, TRANSPOSED)),
        ],
        [1],
        [24],
    )
