"""Compute the gradients of the weights: aᵀ·b of each expert's rows, where the rows of one operand can be gathered.

Every expert has the same number of tiles, so a program finds its tiles without a list. The terms of a tile's sums are
the rows of the expert's group. Four warps load: they gather the rows of one operand, 16 bytes a thread, and let the TMA
copy the rows of the other. Eight warps multiply. A tile is stored while tensor cores multiply the first step of the
next tile. A tile without rows has one step, whose operands are zeros.
"""

from typing import Any

import torch
import triton
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from experts.gemm.hopper.descriptors import MOST_ROWS, aligned, described, grouped_rows
from experts.gemm.hopper.rounding import rounded
from experts.steps import Permutation
from experts.steps.fused.launch import launch

#: Columns of the gathered operand, columns of the other operand, and rows of a step: the sizes of a tile.
LEFT, RIGHT, STEP = 128, 256, 64
STAGES = 3  # steps whose operands are in shared memory at the same time; a fourth does not fit beside the result
LOADING_WARPS, MULTIPLYING_WARPS = 4, 8
LOADING_REGISTERS = 64
#: Tiles with the same columns of the right operand that follow each other; so both operands' columns stay in L2.
BAND = 8


def outer(left: Tensor, right_NQ: Tensor, permutation: Permutation, gather: bool, transposed: bool = False) -> Tensor:
    """Return [L, P, Q]: the sum over each expert's rows of leftᵀ·right. With `transposed`, return [L, Q, P].

    left: [T, P] with `gather`, whose rows are the rows' tokens; else [N, P]. right: [N, Q]. Both have the same 16-bit
    dtype. An expert without rows has zeros. No row past the last group is read. Sums are in float32.
    """
    left, right_NQ = aligned(left), aligned(right_NQ)
    experts, width, depth = permutation.offsets_L.shape[0], left.shape[1], right_NQ.shape[1]
    shape = (experts, depth, width) if transposed else (experts, width, depth)
    if permutation.num_rows == 0:
        return torch.zeros(shape, dtype=left.dtype, device=left.device)
    out = torch.empty(shape, dtype=left.dtype, device=left.device)
    described_out = described(out, [1, RIGHT, LEFT] if transposed else [1, LEFT, RIGHT])
    launch_outer(sum_outer_products, left, right_NQ, described_out, permutation, gather, transposed)
    return out


def launch_outer(
    kernel: Any,
    left: Tensor,
    right_NQ: Tensor,
    out: TensorDescriptor,
    permutation: Permutation,
    gather: bool,
    transposed: bool,
) -> None:
    """Launch a kernel for the products that `outer` describes, with one program per multiprocessor at most."""
    experts, width, depth = permutation.offsets_L.shape[0], left.shape[1], right_NQ.shape[1]
    num_tiles = experts * triton.cdiv(width, LEFT) * triton.cdiv(depth, RIGHT)
    programs = torch.cuda.get_device_properties(left.device).multi_processor_count if left.is_cuda else 1
    launch(
        kernel,
        (min(programs, num_tiles),),
        left,
        grouped_rows(right_NQ, [STEP, RIGHT]),
        out,
        permutation.row_to_slot_N,
        permutation.offsets_L,
        EXPERTS=experts,
        P=width,
        Q=depth,
        K=permutation.n_activated_experts,
        GATHER=gather,
        TRANSPOSED=transposed,
        num_warps=MULTIPLYING_WARPS,
    )


_LEFT, _RIGHT, _STEP, _STAGES = gl.constexpr(LEFT), gl.constexpr(RIGHT), gl.constexpr(STEP), gl.constexpr(STAGES)
_BAND, _WARPS = gl.constexpr(BAND), gl.constexpr(LOADING_WARPS)
_REGISTERS = gl.constexpr(LOADING_REGISTERS)


@gluon.jit
def find_tile(tile, offsets, P: gl.constexpr, Q: gl.constexpr):
    """Return a tile's expert and first columns of the two operands, and the start and end of the expert's group."""
    LEFT_TILES: gl.constexpr = (P + _LEFT - 1) // _LEFT
    RIGHT_TILES: gl.constexpr = (Q + _RIGHT - 1) // _RIGHT
    expert = tile // (LEFT_TILES * RIGHT_TILES)
    tile = tile % (LEFT_TILES * RIGHT_TILES)
    band = tile // (_BAND * RIGHT_TILES)
    tile -= band * (_BAND * RIGHT_TILES)
    height = gl.minimum(LEFT_TILES - band * _BAND, _BAND)
    start = gl.load(offsets + expert - 1, mask=expert > 0, other=0)
    return expert, (band * _BAND + tile % height) * _LEFT, tile // height * _RIGHT, start, gl.load(offsets + expert)


@gluon.jit
def _find_sources(row_to_slot, row, end, K: gl.constexpr, GATHER: gl.constexpr):
    """Return which row of the left operand belongs to each row."""
    if GATHER:
        return gl.load(row_to_slot + row, mask=row < end, other=0).to(gl.int32) // K
    return row


@gluon.jit
def load(
    left,
    right,
    row_to_slot,
    offsets,
    left_tiles,
    right_tiles,
    loaded,
    free,
    num_tiles,
    P: gl.constexpr,
    Q: gl.constexpr,
    K: gl.constexpr,
    GATHER: gl.constexpr,
    ADD: gl.constexpr,
):
    """Load the operands of each step. With ADD, a tile without rows has no step."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // _LEFT, _LEFT // 8], [_WARPS, 1], [1, 0])
    rows = gl.arange(0, _STEP, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, _LEFT, layout=gl.SliceLayout(0, layout))
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _, column, right_column, start, end = find_tile(tile, offsets, P, Q)
        inside = column + columns < P
        source = _find_sources(row_to_slot, start + rows, end, K, GATHER)
        for first in range(start, end if ADD else gl.maximum(end, start + 1), _STEP):
            stage = step % _STAGES
            row = first + rows
            where = left + (source.to(gl.int64) * P)[:, None] + (column + columns)[None, :]
            source = _find_sources(row_to_slot, row + _STEP, end, K, GATHER)  # early: the next step waits for it
            mbarrier.wait(free.index(stage), ((step // _STAGES) & 1) ^ 1)
            mbarrier.expect(loaded.index(stage), right.block_type.nbytes)
            tma.async_copy_global_to_shared(
                right,
                [MOST_ROWS, end, MOST_ROWS - end + first, right_column],
                loaded.index(stage),
                right_tiles.index(stage)._reinterpret(right.dtype, [1, 1, _STEP, _RIGHT], right.layout),
            )
            mask = (row < end)[:, None] & inside[None, :]  # what is masked becomes zero
            async_copy.async_copy_global_to_shared(left_tiles.index(stage), where, mask=mask)
            async_copy.mbarrier_arrive(loaded.index(stage), increment_count=False)
            step += 1


@gluon.jit
def _store(out, result, values, expert, column, right_column, TRANSPOSED: gl.constexpr):
    """Store a tile. What lies past an end of `out` is not stored."""
    tma.store_wait(0)  # the tile before has left the memory of the result
    if TRANSPOSED:
        result.permute((1, 0)).store(values)
        fence_async_shared()
        block = result._reinterpret(out.dtype, [1, _RIGHT, _LEFT], out.layout)
        tma.async_copy_shared_to_global(out, [expert, right_column, column], block)
    else:
        result.store(values)
        fence_async_shared()
        block = result._reinterpret(out.dtype, [1, _LEFT, _RIGHT], out.layout)
        tma.async_copy_shared_to_global(out, [expert, column, right_column], block)


@gluon.jit
def multiply_step(sums, step, left_tiles, right_tiles, loaded, FIRST: gl.constexpr):
    stage = step % _STAGES
    mbarrier.wait(loaded.index(stage), (step // _STAGES) & 1)
    fence_async_shared()  # tensor cores read what the loading warps wrote
    left_tile = left_tiles.index(stage).permute((1, 0))
    sums = warpgroup_mma(left_tile, right_tiles.index(stage), sums, use_acc=not FIRST, is_async=True)
    return warpgroup_mma_wait(1, deps=(sums,))


@gluon.jit
def _multiply(
    out,
    offsets,
    left_tiles,
    right_tiles,
    result,
    loaded,
    free,
    num_tiles,
    P: gl.constexpr,
    Q: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, _RIGHT, 16])
    step = 0
    # A tile is stored while the first step of the next tile is multiplied. Before the first tile, nothing is stored.
    done = gl.zeros([_LEFT, _RIGHT], out.dtype, layout)
    expert, column, right_column = 0, P, 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        sums = gl.zeros([_LEFT, _RIGHT], gl.float32, layout)
        sums = multiply_step(sums, step, left_tiles, right_tiles, loaded, True)
        step += 1
        _store(out, result, done, expert, column, right_column, TRANSPOSED)
        expert, column, right_column, start, end = find_tile(tile, offsets, P, Q)
        for _ in range(start + _STEP, end, _STEP):
            sums = multiply_step(sums, step, left_tiles, right_tiles, loaded, False)
            mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
            step += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
        done = rounded(sums, out.dtype)
    _store(out, result, done, expert, column, right_column, TRANSPOSED)
    tma.store_wait(0)


@gluon.jit
def make_buffers(dtype: gl.constexpr):
    """Return memory for the operands of all stages, and the barriers on which the warps wait for each other."""
    LEFT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_STEP, _LEFT], dtype)
    RIGHT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_STEP, _RIGHT], dtype)
    left_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _STEP, _LEFT], LEFT_LAYOUT)
    right_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _STEP, _RIGHT], RIGHT_LAYOUT)
    loaded = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(loaded.index(stage), count=1 + 32 * _WARPS)  # the TMA, and each thread that gathers
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    return left_tiles, right_tiles, loaded, free


@gluon.jit
def sum_outer_products(
    left,
    right,
    out,
    row_to_slot,
    offsets,
    EXPERTS: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    K: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    num_warps: gl.constexpr,
):
    left_tiles, right_tiles, loaded, free = make_buffers(right.dtype)
    SHAPE: gl.constexpr = [_RIGHT, _LEFT] if TRANSPOSED else [_LEFT, _RIGHT]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, out.dtype)
    result = gl.allocate_shared_memory(out.dtype, SHAPE, LAYOUT)
    num_tiles = EXPERTS * ((P + _LEFT - 1) // _LEFT) * ((Q + _RIGHT - 1) // _RIGHT)
    gl.warp_specialize(
        [
            (
                _multiply,
                (out, offsets, left_tiles, right_tiles, result, loaded, free, num_tiles, P, Q, TRANSPOSED, num_warps),
            ),
            (
                load,
                (
                    left,
                    right,
                    row_to_slot,
                    offsets,
                    left_tiles,
                    right_tiles,
                    loaded,
                    free,
                    num_tiles,
                    P,
                    Q,
                    K,
                    GATHER,
                    False,
                ),
            ),
        ],
        [_WARPS],
        [_REGISTERS],
    )
