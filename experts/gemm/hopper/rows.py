"""Multiply rows, in permuted order or gathered from tokens, by their experts' matrices. Eight warps multiply.

The programs go through the list of tiles of `experts.gemm.products`. The TMA copies the matrices, the result, and rows
in permuted order. For these rows, one warp loads. The rows of tokens are gathered by four warps, 16 bytes a thread. A
tile is stored while tensor cores multiply the first step of the next tile. On an H200 (2026-11-30), tensor cores were
idle for about 3,000 cycles a tile without this overlap: 5% of the time with 64 steps a tile, and 20% with 12.
"""

from typing import Any

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from experts.gemm.hopper.descriptors import MOST_ROWS, aligned, described, grouped_rows
from experts.gemm.hopper.gate import glu_of_pairs
from experts.gemm.hopper.loading import (
    GATHERING_REGISTERS,
    GATHERING_WARPS,
    load_rows,
    load_tokens,
    read_tile,
)
from experts.gemm.hopper.rounding import rounded
from experts.gemm.tiling import LARGE, PAIRS
from experts.steps import Permutation
from experts.steps.fused.launch import launch


def product(
    a: Tensor,
    b_LPQ: Tensor,
    out_NQ: Tensor,
    permutation: Permutation,
    tiles: Tensor,
    programs: int,
    gather: bool,
    transposed: bool,
) -> None:
    """Write [N, Q]: each row of a times its expert's matrix of b [L, P, Q], or its transpose of b [L, Q, P].

    a: [T, P] with `gather`, whose rows are the rows' tokens; else [N, P]. All have the same 16-bit dtype. The tiles
    are those of `experts.gemm.products`, of `LARGE`. Rows without a tile stay unwritten. Sums are in float32.
    """
    a, b_LPQ = aligned(a), aligned(b_LPQ)
    depth = b_LPQ.shape[2 if transposed else 1]
    block = [1, LARGE.columns, LARGE.depth] if transposed else [1, LARGE.depth, LARGE.columns]
    rows = a if gather else described(a, [LARGE.rows, LARGE.depth])
    _launch(rows, described(b_LPQ, block), out_NQ, None, permutation, tiles, programs, depth, gather, transposed)


def activated_product(
    x_TD: Tensor,
    b_LDH: Tensor,
    out_NI: Tensor,
    permutation: Permutation,
    tiles: Tensor,
    programs: int,
    weights_TK: Tensor | None,
) -> None:
    """Write [N, I]: silu(gate)·up of each row's token times its expert's matrix, times the row's routing weight.

    x: [T, D]; b: [L, D, H], whose columns are those of gate, then those of up; weights: [T, K] or None; H = 2I. The
    tiles are those of `experts.gemm.products`, of `PAIRS`. The activation is computed from the float32 sums.
    """
    x_TD, b_LDH = aligned(x_TD), aligned(b_LDH)
    experts, depth, width = b_LDH.shape
    halves = b_LDH.view(experts, depth, 2, width // 2).transpose(1, 2)
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    pairs = described(halves, [1, 2, PAIRS.depth, PAIRS.columns])
    _launch(x_TD, pairs, out_NI, weights_TK, permutation, tiles, programs, depth, gather=True, pairs=True)


def _launch(
    a: Any,
    b: TensorDescriptor,
    out: Tensor,
    weights_TK: Tensor | None,
    permutation: Permutation,
    tiles: Tensor,
    programs: int,
    depth: int,
    gather: bool,
    transposed: bool = False,
    pairs: bool = False,
) -> None:
    launch(
        multiply_rows,
        (programs,),
        a,
        b,
        grouped_rows(out, [LARGE.rows, PAIRS.columns if pairs else LARGE.columns]),
        weights_TK,
        permutation.row_to_slot_N,
        tiles,
        DEPTH=depth,
        K=permutation.n_activated_experts,
        GATHER=gather,
        TRANSPOSED=transposed,
        PAIRS=pairs,
        num_warps=LARGE.warps,
    )


_ROWS, _COLUMNS = gl.constexpr(LARGE.rows), gl.constexpr(LARGE.columns)
_STEP, _STAGES = gl.constexpr(LARGE.depth), gl.constexpr(LARGE.stages)


@gluon.jit
def _store(out, result, values, first_row, end, column):
    tma.store_wait(0)  # the tile before has left the memory of the result
    result.store(values)
    fence_async_shared()
    block = result._reinterpret(out.dtype, out.block_type.shape, out.layout)
    tma.async_copy_shared_to_global(out, [MOST_ROWS, end, MOST_ROWS - end + first_row, column], block)


@gluon.jit
def multiply_step(
    sums, step, a_tiles, b_tiles, loaded, GATHER: gl.constexpr, TRANSPOSED: gl.constexpr, FIRST: gl.constexpr
):
    """Return the sums with a step that tensor cores may still multiply. The step before is done."""
    stage = step % _STAGES
    mbarrier.wait(loaded.index(stage), (step // _STAGES) & 1)
    if GATHER:
        fence_async_shared()  # tensor cores read what the loading warps wrote
    b_tile = b_tiles.index(stage).permute((1, 0)) if TRANSPOSED else b_tiles.index(stage)
    sums = warpgroup_mma(a_tiles.index(stage), b_tile, sums, use_acc=not FIRST, is_async=True)
    return warpgroup_mma_wait(1, deps=(sums,))


@gluon.jit
def _multiply(
    out,
    weights,
    row_to_slot,
    tiles,
    a_tiles,
    b_tiles,
    result,
    loaded,
    free,
    DEPTH: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    PAIRS: gl.constexpr,
    WARPS: gl.constexpr,
):
    WIDTH: gl.constexpr = _COLUMNS // 2 if PAIRS else _COLUMNS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, _COLUMNS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    rows = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, out_layout))
    num_tiles = gl.load(tiles)
    step = 0
    # A tile is stored while the first step of the next tile is multiplied. Before the first tile, nothing is stored.
    done = gl.zeros([_ROWS, WIDTH], out.dtype, out_layout)
    done_row, done_end, done_column = 0, 0, 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        sums = gl.zeros([_ROWS, _COLUMNS], gl.float32, layout)
        sums = multiply_step(sums, step, a_tiles, b_tiles, loaded, GATHER, TRANSPOSED, True)
        step += 1
        _store(out, result, done, done_row, done_end, done_column)
        _, column_tile, done_row, done_end = read_tile(tiles, tile)
        done_column = column_tile * WIDTH
        if PAIRS and weights is not None:
            valid = done_row + rows < done_end
            slot = gl.load(row_to_slot + done_row + rows, mask=valid, other=0)
            weight = gl.load(weights + slot, mask=valid, other=0.0).to(gl.float32)
        for _ in range(_STEP, DEPTH, _STEP):
            sums = multiply_step(sums, step, a_tiles, b_tiles, loaded, GATHER, TRANSPOSED, False)
            mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
            step += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
        if PAIRS:
            value = glu_of_pairs(sums, WARPS)
            if weights is not None:
                value *= weight[:, None]
            done = rounded(value, out.dtype)
        else:
            done = rounded(sums, out.dtype)
    _store(out, result, done, done_row, done_end, done_column)
    tma.store_wait(0)


@gluon.jit
def multiply_rows(
    a,
    b,
    out,
    weights,
    row_to_slot,
    tiles,
    DEPTH: gl.constexpr,
    K: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    PAIRS: gl.constexpr,
    num_warps: gl.constexpr,
):
    WIDTH: gl.constexpr = _COLUMNS // 2 if PAIRS else _COLUMNS
    dtype: gl.constexpr = b.dtype
    A_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _STEP], dtype)
    a_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _ROWS, _STEP], A_LAYOUT)
    if TRANSPOSED:
        TURNED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_COLUMNS, _STEP], dtype)
        b_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _COLUMNS, _STEP], TURNED)
    else:
        STRAIGHT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_STEP, _COLUMNS], dtype)
        b_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _STEP, _COLUMNS], STRAIGHT)
    OUT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, WIDTH], dtype)
    result = gl.allocate_shared_memory(dtype, [_ROWS, WIDTH], OUT_LAYOUT)
    loaded = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(loaded.index(stage), count=1 + 32 * GATHERING_WARPS if GATHER else 1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    # twice, because Gluon loses the constants of a tuple that has a name
    if GATHER:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        out,
                        weights,
                        row_to_slot,
                        tiles,
                        a_tiles,
                        b_tiles,
                        result,
                        loaded,
                        free,
                        DEPTH,
                        GATHER,
                        TRANSPOSED,
                        PAIRS,
                        num_warps,
                    ),
                ),
                (
                    load_tokens,
                    (
                        a,
                        b,
                        row_to_slot,
                        tiles,
                        a_tiles,
                        b_tiles,
                        loaded,
                        free,
                        DEPTH,
                        K,
                        TRANSPOSED,
                        PAIRS,
                        GATHERING_WARPS,
                    ),
                ),
            ],
            [GATHERING_WARPS],
            [GATHERING_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        out,
                        weights,
                        row_to_slot,
                        tiles,
                        a_tiles,
                        b_tiles,
                        result,
                        loaded,
                        free,
                        DEPTH,
                        GATHER,
                        TRANSPOSED,
                        PAIRS,
                        num_warps,
                    ),
                ),
                (load_rows, (a, b, tiles, a_tiles, b_tiles, loaded, free, DEPTH, TRANSPOSED, False)),
            ],
            [1],
            [24],
        )
