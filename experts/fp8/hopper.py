"""Multiply rows in FP8 by their experts' matrices in FP8 on Hopper GPUs. One warp loads, two groups of warps multiply.

A tile of the result has 128 rows and two blocks of 128 columns. Each of the two groups has 64 of the rows. Tensor cores
sum 128 products, in a precision of about 14 bits. The group then adds the sums, times their scales, to sums in float32.
While one group adds, the tensor cores multiply for the other group. The TMA copies operands and results.
"""

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

from experts.fp8.blocks import BLOCK, Matrices, Rows
from experts.gemm.hopper.descriptors import MOST_ROWS
from experts.gemm.kernels import TILE_FIELDS
from experts.steps.fused.launch import launch

SLAB = 64  # rows of one group of warps
STAGES = 4
MULTIPLYING_WARPS, MULTIPLYING_REGISTERS, LOADING_REGISTERS = 4, 240, 24
_UNLIMITED = 2**31 - 2**16
#: The stride that, 2³⁰ times, is a multiple of 2⁶⁴ bytes for every size of an element.
_WHOLE_ROUND = 2**34

_BLOCK, _SLAB, _STAGES = gl.constexpr(BLOCK), gl.constexpr(SLAB), gl.constexpr(STAGES)
_WARPS, _REGISTERS = gl.constexpr(MULTIPLYING_WARPS), gl.constexpr(MULTIPLYING_REGISTERS)
_LOADING_REGISTERS = gl.constexpr(LOADING_REGISTERS)


def multiply(rows: Rows, matrices: Matrices, out: Tensor, tiles: Tensor, programs: int) -> None:
    """Write [N, Q] to `out`: each row times the transpose of its expert's matrix; see `experts.fp8.products.product`.

    The tiles have 128 rows and 2 blocks of columns. Rows past the last group stay unwritten.
    """
    experts, q, p = matrices.values.shape
    q_width, p_width = q // matrices.q_halves, p // matrices.p_halves
    launch(
        multiply_fp8,
        (programs,),
        described(rows.values.view(-1, matrices.p_halves, p_width), [SLAB, 1, BLOCK]),
        rows.scales,
        described(matrices.values.view(experts, q, matrices.p_halves, p_width), [1, BLOCK, 1, BLOCK]),
        matrices.scales,
        grouped_parts(out, matrices.q_halves),
        tiles,
        rows.scales.shape[1],
        P_WIDTH=p_width,
        P_HALVES=matrices.p_halves,
        Q_WIDTH=q_width,
        Q_HALVES=matrices.q_halves,
        num_warps=MULTIPLYING_WARPS,
    )


def shared_layout(rank: int, bits: int) -> gl.NVMMASharedLayout:
    """Return the layout of a tile in shared memory, which tensor cores read: swizzled rows of 128 bytes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=rank)


def described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Return the descriptor of a contiguous tensor in FP8, in blocks that have the tensor's rank."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, shared_layout(len(block), 8))


def grouped_parts(out: Tensor, halves: int) -> TensorDescriptor:
    """Return the descriptor for stores of 64 rows × 128 columns of one half that end with the rows' group and the half.

    See `experts.gemm.hopper.descriptors.grouped_rows`.
    """
    width = out.shape[1]
    shape = [_UNLIMITED, _UNLIMITED, MOST_ROWS.value, halves, width // halves]
    strides = [_WHOLE_ROUND - width, width, width, width // halves, 1]
    return TensorDescriptor(out, shape, strides, [1, 1, SLAB, 1, BLOCK], shared_layout(5, 16))


@gluon.jit
def _read_tile(tiles, tile):
    """Return a tile's expert, pair of blocks of columns, first row, and the end of the expert's group."""
    entry = tiles + (1 + tile) * TILE_FIELDS
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def _column(block, Q_WIDTH: gl.constexpr):
    """Return the half of a block of columns, and the block's first column in it."""
    BLOCKS: gl.constexpr = (Q_WIDTH + _BLOCK - 1) // _BLOCK
    return block // BLOCKS, block % BLOCKS * _BLOCK


@gluon.jit
def _load(
    a,
    b,
    tiles,
    a_tiles,
    b_tiles,
    loaded,
    free,
    P_WIDTH: gl.constexpr,
    P_HALVES: gl.constexpr,
    Q_WIDTH: gl.constexpr,
    Q_HALVES: gl.constexpr,
):
    P_BLOCKS: gl.constexpr = (P_WIDTH + _BLOCK - 1) // _BLOCK
    Q_BLOCKS: gl.constexpr = (Q_WIDTH + _BLOCK - 1) // _BLOCK * Q_HALVES
    num_tiles = gl.load(tiles)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, pair, first_row, _ = _read_tile(tiles, tile)
        left_half, left = _column(2 * pair, Q_WIDTH)
        right_half, right = _column(gl.minimum(2 * pair + 1, Q_BLOCKS - 1), Q_WIDTH)
        left += left_half * Q_WIDTH
        right += right_half * Q_WIDTH
        for block in range(P_BLOCKS * P_HALVES):
            half, p = block // P_BLOCKS, block % P_BLOCKS * _BLOCK
            stage = step % _STAGES
            barrier = loaded.index(stage)
            mbarrier.wait(free.index(stage), ((step // _STAGES) & 1) ^ 1)
            mbarrier.expect(barrier, 2 * a.block_type.nbytes + 2 * b.block_type.nbytes)
            for slab in gl.static_range(2):
                target = a_tiles.index(2 * stage + slab)._reinterpret(a.dtype, [_SLAB, 1, _BLOCK], a.layout)
                tma.async_copy_global_to_shared(a, [first_row + slab * _SLAB, half, p], barrier, target)
            target = b_tiles.index(2 * stage)._reinterpret(b.dtype, [1, _BLOCK, 1, _BLOCK], b.layout)
            tma.async_copy_global_to_shared(b, [expert, left, half, p], barrier, target)
            target = b_tiles.index(2 * stage + 1)._reinterpret(b.dtype, [1, _BLOCK, 1, _BLOCK], b.layout)
            tma.async_copy_global_to_shared(b, [expert, right, half, p], barrier, target)
            step += 1


@gluon.jit
def _store(out, sums, result, first_row, end, block, Q_WIDTH: gl.constexpr):
    half, column = _column(block, Q_WIDTH)
    tma.store_wait(0)  # the tile before has left the memory of the result
    result.store(sums.to(out.dtype))
    fence_async_shared()
    source = result._reinterpret(out.dtype, [1, 1, _SLAB, 1, _BLOCK], out.layout)
    tma.async_copy_shared_to_global(out, [MOST_ROWS, end, MOST_ROWS - end + first_row, half, column], source)


@gluon.jit
def _multiply(
    a_scales,
    b_scales,
    out,
    tiles,
    a_tiles,
    b_tiles,
    results,
    loaded,
    free,
    num_scales,
    P_WIDTH: gl.constexpr,
    P_HALVES: gl.constexpr,
    Q_WIDTH: gl.constexpr,
    Q_HALVES: gl.constexpr,
    WHICH: gl.constexpr,
):
    P_BLOCKS: gl.constexpr = (P_WIDTH + _BLOCK - 1) // _BLOCK * P_HALVES
    Q_BLOCKS: gl.constexpr = (Q_WIDTH + _BLOCK - 1) // _BLOCK * Q_HALVES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _BLOCK, 32])
    rows = gl.arange(0, _SLAB, layout=gl.SliceLayout(1, layout))
    result = results.index(WHICH)
    zeros = gl.zeros([_SLAB, _BLOCK], gl.float32, layout)
    num_tiles = gl.load(tiles)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, pair, first_row, end = _read_tile(tiles, tile)
        first_row += WHICH * _SLAB
        if first_row < end:
            left_sums = gl.zeros([_SLAB, _BLOCK], gl.float32, layout)
            right_sums = gl.zeros([_SLAB, _BLOCK], gl.float32, layout)
            a_where = a_scales + gl.minimum(first_row + rows, num_scales - 1)  # later rows are not stored
            left_where = b_scales + (expert.to(gl.int64) * Q_BLOCKS + 2 * pair) * P_BLOCKS
            right_where = (
                b_scales + (expert.to(gl.int64) * Q_BLOCKS + gl.minimum(2 * pair + 1, Q_BLOCKS - 1)) * P_BLOCKS
            )
            a_scale = gl.load(a_where)
            left_scale, right_scale = gl.load(left_where), gl.load(right_where)
            for block in range(P_BLOCKS):
                stage = step % _STAGES
                by_left, by_right = a_scale * left_scale, a_scale * right_scale
                following = gl.minimum(block + 1, P_BLOCKS - 1)  # early: the next step waits for the loads
                a_scale = gl.load(a_where + following * num_scales)
                left_scale, right_scale = gl.load(left_where + following), gl.load(right_where + following)
                mbarrier.wait(loaded.index(stage), (step // _STAGES) & 1)
                a_tile = a_tiles.index(2 * stage + WHICH)
                sums = warpgroup_mma(
                    a_tile, b_tiles.index(2 * stage).permute((1, 0)), zeros, use_acc=False, is_async=True
                )
                sums = warpgroup_mma_wait(0, deps=(sums,))
                left_sums += sums * gl.expand_dims(by_left, 1)
                sums = warpgroup_mma(
                    a_tile, b_tiles.index(2 * stage + 1).permute((1, 0)), zeros, use_acc=False, is_async=True
                )
                sums = warpgroup_mma_wait(0, deps=(sums,))
                mbarrier.arrive(free.index(stage))
                right_sums += sums * gl.expand_dims(by_right, 1)
                step += 1
            _store(out, left_sums, result, first_row, end, 2 * pair, Q_WIDTH)
            if 2 * pair + 1 < Q_BLOCKS:
                _store(out, right_sums, result, first_row, end, 2 * pair + 1, Q_WIDTH)
        else:  # no row of the group is in this slab
            for _ in range(P_BLOCKS):
                stage = step % _STAGES
                mbarrier.wait(loaded.index(stage), (step // _STAGES) & 1)
                mbarrier.arrive(free.index(stage))
                step += 1
    tma.store_wait(0)


@gluon.jit
def multiply_fp8(
    a,
    a_scales,
    b,
    b_scales,
    out,
    tiles,
    num_scales,
    P_WIDTH: gl.constexpr,
    P_HALVES: gl.constexpr,
    Q_WIDTH: gl.constexpr,
    Q_HALVES: gl.constexpr,
    num_warps: gl.constexpr,
):
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    RESULT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    a_tiles = gl.allocate_shared_memory(a.dtype, [2 * _STAGES, _SLAB, _BLOCK], OPERAND)
    b_tiles = gl.allocate_shared_memory(b.dtype, [2 * _STAGES, _BLOCK, _BLOCK], OPERAND)
    results = gl.allocate_shared_memory(out.dtype, [2, _SLAB, _BLOCK], RESULT)
    loaded = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)  # both groups of warps
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    a_scales,
                    b_scales,
                    out,
                    tiles,
                    a_tiles,
                    b_tiles,
                    results,
                    loaded,
                    free,
                    num_scales,
                    P_WIDTH,
                    P_HALVES,
                    Q_WIDTH,
                    Q_HALVES,
                    0,
                ),
            ),
            (
                _multiply,
                (
                    a_scales,
                    b_scales,
                    out,
                    tiles,
                    a_tiles,
                    b_tiles,
                    results,
                    loaded,
                    free,
                    num_scales,
                    P_WIDTH,
                    P_HALVES,
                    Q_WIDTH,
                    Q_HALVES,
                    1,
                ),
            ),
            (_load, (a, b, tiles, a_tiles, b_tiles, loaded, free, P_WIDTH, P_HALVES, Q_WIDTH, Q_HALVES)),
        ],
        [_WARPS, 1],
        [_REGISTERS, _LOADING_REGISTERS],
    )
