"""Multiply rows in FP8 by their experts' matrices in FP8; see `experts.fp8.hopper`."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from experts.fp8.blocks import BLOCK, Matrices, Rows
from experts.fp8.hopper.steps import (
    LOADING_REGISTERS,
    REGISTERS_OF_THREE,
    SLAB,
    WARPS,
    allocate,
    begin_block,
    count_blocks,
    count_slabs,
    described,
    find_operands,
    load_step,
    no_block,
    shared_layout,
    skip_steps,
    split_column,
    store_block,
)
from experts.gemm.hopper.descriptors import MOST_ROWS
from experts.gemm.hopper.rounding import rounded
from experts.gemm.kernels import TILE_FIELDS
from experts.steps.fused.launch import launch

_UNLIMITED = 2**31 - 2**16
#: The stride that, 2³⁰ times, is a multiple of 2⁶⁴ bytes for every size of an element.
_WHOLE_ROUND = 2**34
#: Steps whose operands are in shared memory at the same time.
STAGES = 4
#: By how many places a program moves on in each round of tiles. With 132 programs, the steps have 137 tiles.
SHIFT = 5

_BLOCK, _SLAB, _WARPS = gl.constexpr(BLOCK), gl.constexpr(SLAB), gl.constexpr(WARPS)
_REGISTERS, _LOADING_REGISTERS = gl.constexpr(REGISTERS_OF_THREE), gl.constexpr(LOADING_REGISTERS)
_STAGES, _SHIFT = gl.constexpr(STAGES), gl.constexpr(SHIFT)


def multiply(rows: Rows, matrices: Matrices, out: Tensor, tiles: Tensor, programs: int) -> None:
    """Write [N, Q] to `out`: each row times the transpose of its expert's matrix; see `experts.fp8.products.product`.

    The tiles have 192 rows and a block of columns. Rows past the last group stay unwritten.
    """
    experts, q, p = matrices.values.shape
    q_width, p_width = q // matrices.q_halves, p // matrices.p_halves
    launch(
        multiply_fp8,
        (programs,),
        described(rows.values.view(-1, matrices.p_halves, p_width), [SLAB, 1, BLOCK]),
        rows.scales,
        described(matrices.values.view(experts * q, matrices.p_halves, p_width), [BLOCK, 1, BLOCK]),
        matrices.scales,
        grouped_parts(out, matrices.q_halves, [SLAB, BLOCK]),
        tiles,
        *(rows.scales.shape[1], p_width, q_width),
        P_HALVES=matrices.p_halves,
        Q_HALVES=matrices.q_halves,
        num_warps=WARPS,
    )


def grouped_parts(out: Tensor, halves: int, block: list[int]) -> TensorDescriptor:
    """Return the descriptor for copies of a block [rows, columns] of a half that end with the rows' group and the half.

    See `experts.gemm.hopper.descriptors.grouped_rows`.
    """
    width = out.shape[1]
    shape = [_UNLIMITED, _UNLIMITED, MOST_ROWS.value, halves, width // halves]
    strides = [_WHOLE_ROUND - width, width, width, width // halves, 1]
    return TensorDescriptor(
        out, shape, strides, [1, 1, block[0], 1, block[1]], shared_layout(5, 8 * out.element_size())
    )


@gluon.jit
def read_tile(tiles, tile):
    """Return a tile's expert, block of columns, first row, and the end of the expert's group."""
    entry = tiles + (1 + tile) * TILE_FIELDS
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def tile_of_round(number):
    """Return this program's tile in a round.

    The last tile of an expert's rows has less work than the others, and comes at regular distances in the list. With
    132 multiprocessors, as an H200 has, a program moves on by 137 tiles, which is a prime. So such tiles meet all
    programs equally often.
    """
    programs = gl.num_programs(0)
    return number * programs + (gl.program_id(0) + number * _SHIFT) % programs


@gluon.jit
def count_rounds(num_tiles):
    """Return the number of rounds in which this program has a tile."""
    whole = num_tiles // gl.num_programs(0)
    return whole + (tile_of_round(whole) < num_tiles).to(gl.int32)


@gluon.jit
def load_tiles(
    a,
    b,
    tiles,
    memory,
    p_width,
    q_width,
    P_HALVES: gl.constexpr,
    Q_HALVES: gl.constexpr,
    GATED: gl.constexpr,
):
    p_blocks = count_blocks(p_width)
    num_tiles, num_steps = gl.load(tiles), P_HALVES * p_blocks
    step = 0
    for number in range(count_rounds(num_tiles)):
        expert, block, first_row, end = read_tile(tiles, tile_of_round(number))
        slabs = count_slabs(end - first_row)
        if GATED:  # the same columns of gate and of up
            left = 2 * expert * q_width + block * _BLOCK
        else:
            half, left = split_column(block, q_width, Q_HALVES)
            left += (expert * Q_HALVES + half) * q_width
        BLOCKS: gl.constexpr = 2 if GATED else 1
        for half in gl.static_range(P_HALVES):
            for index in range(p_blocks):
                p = index * _BLOCK
                load_step(
                    a, b, first_row, slabs, left, left + q_width, half, p, memory, step, step, num_steps, True, BLOCKS
                )
                step += 1


@gluon.jit
def _multiply_block(
    a_where,
    a_stride,
    b_where,
    num_steps,
    memory,
    step,
    out,
    done,
    end,
    place,
    half,
    column,
    WHICH: gl.constexpr,
):
    """Return a slab's float32 sums over one or more steps, for one block of columns.

    `a_where` points to the scales of the slab's rows, and `b_where` to those of the block. While the first step is
    multiplied, store `done`, the block of the tile before, at its place, which the arguments from `end` to `column`
    give.
    """
    _, b_tiles, results, _, free, _ = memory
    last = num_steps - 1
    a_scale, b_scale = gl.load(a_where), gl.load(b_where)
    # two steps early: the loads take longer than a step
    second, third = gl.minimum(1, last), gl.minimum(2, last)
    next_a, next_b = gl.load(a_where + second * a_stride), gl.load(b_where + second)
    later_a, later_b = gl.load(a_where + third * a_stride), gl.load(b_where + third)
    a_tile, stage = find_operands(0, num_steps, memory, step, WHICH)
    sums = begin_block(a_tile, b_tiles.index(stage))
    store_block(out, results.index(WHICH), done, MOST_ROWS, end, place, half, column)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(free.index(stage))
    total = sums * gl.expand_dims(a_scale * b_scale, 1)
    step += 1
    for index in range(1, num_steps):
        a_scale, b_scale = next_a, next_b
        next_a, next_b = later_a, later_b
        following = gl.minimum(index + 2, last)
        later_a, later_b = gl.load(a_where + following * a_stride), gl.load(b_where + following)
        a_tile, stage = find_operands(index, num_steps, memory, step, WHICH)
        sums = begin_block(a_tile, b_tiles.index(stage))
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index(stage))
        total += sums * gl.expand_dims(a_scale * b_scale, 1)
        step += 1
    return total


@gluon.jit
def _multiply(
    a_scales,
    b_scales,
    out,
    tiles,
    memory,
    num_scales,
    p_width,
    q_width,
    P_HALVES: gl.constexpr,
    Q_HALVES: gl.constexpr,
    WHICH: gl.constexpr,
):
    p_blocks, q_blocks = count_blocks(p_width) * P_HALVES, count_blocks(q_width) * Q_HALVES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _BLOCK, 32])
    rows = gl.arange(0, _SLAB, layout=gl.SliceLayout(1, layout))
    num_tiles = gl.load(tiles)
    step = 0
    # a tile is stored while the next tile is multiplied; before the first tile, nothing is stored
    done = no_block(out.dtype)
    row, end, half, column = 0, 0, 0, 0
    expert, block, first_row, next_end = read_tile(tiles, gl.program_id(0))
    for number in range(count_rounds(num_tiles)):
        # read early, as the place of the operands' scales depends on it
        following = read_tile(tiles, gl.minimum(tile_of_round(number + 1), num_tiles - 1))
        first_row += WHICH * _SLAB
        place = MOST_ROWS - end + row
        if first_row < next_end:
            a_where = a_scales + gl.minimum(first_row + rows, num_scales - 1)  # later rows are not stored
            b_where = b_scales + (expert.to(gl.int64) * q_blocks + block) * p_blocks
            sums = _multiply_block(
                a_where, num_scales, b_where, p_blocks, memory, step, out, done, end, place, half, column, WHICH
            )
            done = rounded(sums, out.dtype)
        else:  # no row of the group is in this slab
            store_block(out, memory[2].index(WHICH), done, MOST_ROWS, end, place, half, column)
            skip_steps(p_blocks, memory, step, WHICH, False)
            done = no_block(out.dtype)
        row, end = first_row, next_end
        half, column = split_column(block, q_width, Q_HALVES)
        expert, block, first_row, next_end = following
        step += p_blocks
    store_block(out, memory[2].index(WHICH), done, MOST_ROWS, end, MOST_ROWS - end + row, half, column)
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
    p_width,
    q_width,
    P_HALVES: gl.constexpr,
    Q_HALVES: gl.constexpr,
    num_warps: gl.constexpr,
):
    memory = allocate(a.dtype, b.dtype, out.dtype, 3, 1, _STAGES, 0)
    gl.warp_specialize(
        [
            (
                _multiply,
                (a_scales, b_scales, out, tiles, memory, num_scales, p_width, q_width, P_HALVES, Q_HALVES, 0),
            ),
            (
                _multiply,
                (a_scales, b_scales, out, tiles, memory, num_scales, p_width, q_width, P_HALVES, Q_HALVES, 1),
            ),
            (
                _multiply,
                (a_scales, b_scales, out, tiles, memory, num_scales, p_width, q_width, P_HALVES, Q_HALVES, 2),
            ),
            (load_tiles, (a, b, tiles, memory, p_width, q_width, P_HALVES, Q_HALVES, False)),
        ],
        [_WARPS, _WARPS, 1],
        [_REGISTERS, _REGISTERS, _LOADING_REGISTERS],
    )
