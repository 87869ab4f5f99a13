"""Multiply rows in FP8 by their experts' matrices in FP8; see `experts.fp8.hopper`."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from experts.fp8.blocks import BLOCK, Matrices, Rows
from experts.fp8.hopper.steps import (
    LOADING_REGISTERS,
    MULTIPLYING_REGISTERS,
    MULTIPLYING_WARPS,
    SLAB,
    allocate,
    count_blocks,
    described,
    load_step,
    multiply_tile,
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

_BLOCK, _SLAB = gl.constexpr(BLOCK), gl.constexpr(SLAB)
_WARPS, _REGISTERS = gl.constexpr(MULTIPLYING_WARPS), gl.constexpr(MULTIPLYING_REGISTERS)
_LOADING_REGISTERS, _STAGES = gl.constexpr(LOADING_REGISTERS), gl.constexpr(STAGES)


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
        described(matrices.values.view(experts * q, matrices.p_halves, p_width), [BLOCK, 1, BLOCK]),
        matrices.scales,
        grouped_parts(out, matrices.q_halves),
        tiles,
        *(rows.scales.shape[1], p_width, q_width),
        P_HALVES=matrices.p_halves,
        Q_HALVES=matrices.q_halves,
        num_warps=MULTIPLYING_WARPS,
    )


def grouped_parts(out: Tensor, halves: int) -> TensorDescriptor:
    """Return the descriptor for stores of 64 rows × 128 columns of one half that end with the rows' group and the half.

    See `experts.gemm.hopper.descriptors.grouped_rows`.
    """
    width = out.shape[1]
    shape = [_UNLIMITED, _UNLIMITED, MOST_ROWS.value, halves, width // halves]
    strides = [_WHOLE_ROUND - width, width, width, width // halves, 1]
    return TensorDescriptor(out, shape, strides, [1, 1, SLAB, 1, BLOCK], shared_layout(5, 8 * out.element_size()))


@gluon.jit
def read_tile(tiles, tile):
    """Return a tile's expert, pair of blocks of columns, first row, and the end of the expert's group."""
    entry = tiles + (1 + tile) * TILE_FIELDS
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


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
    p_blocks, q_blocks = count_blocks(p_width), count_blocks(q_width) * Q_HALVES
    num_tiles, num_steps = gl.load(tiles), P_HALVES * p_blocks
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, pair, first_row, _ = read_tile(tiles, tile)
        if GATED:  # the same columns of gate and of up
            left = 2 * expert * q_width + pair * _BLOCK
            right = left + q_width
        else:
            left_half, left = split_column(2 * pair, q_width, Q_HALVES)
            right_half, right = split_column(gl.minimum(2 * pair + 1, q_blocks - 1), q_width, Q_HALVES)
            left += (expert * Q_HALVES + left_half) * q_width
            right += (expert * Q_HALVES + right_half) * q_width
        for half in gl.static_range(P_HALVES):
            for block in range(p_blocks):
                load_step(a, b, first_row, left, right, half, block * _BLOCK, memory, step, step, num_steps, True)
                step += 1


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
    done_left, done_right = no_block(out.dtype), no_block(out.dtype)
    row, end, left_half, left, right_half, right = 0, 0, 0, 0, 0, 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, pair, first_row, next_end = read_tile(tiles, tile)
        first_row += WHICH * _SLAB
        place = MOST_ROWS - end + row
        if first_row < next_end:
            a_where = a_scales + gl.minimum(first_row + rows, num_scales - 1)  # later rows are not stored
            b_where = b_scales + expert.to(gl.int64) * (q_blocks * p_blocks)
            left_where = b_where + 2 * pair * p_blocks
            right_where = b_where + gl.minimum(2 * pair + 1, q_blocks - 1) * p_blocks
            left_sums, right_sums = multiply_tile(
                a_where, num_scales, left_where, right_where, 1, p_blocks, memory, step, out, done_left, done_right,
                MOST_ROWS, end, place, left_half, left, right_half, right, True, WHICH
            )  # fmt: skip
            done_left, done_right = rounded(left_sums, out.dtype), rounded(right_sums, out.dtype)
        else:  # no row of the group is in this slab
            store_block(out, memory[2].index(WHICH), done_left, MOST_ROWS, end, place, left_half, left)
            store_block(out, memory[2].index(WHICH), done_right, MOST_ROWS, end, place, right_half, right)
            skip_steps(p_blocks, memory, step, WHICH)
            done_left, done_right = no_block(out.dtype), no_block(out.dtype)
        row, end = first_row, next_end
        left_half, left = split_column(2 * pair, q_width, Q_HALVES)
        right_half, right = split_column(2 * pair + 1, q_width, Q_HALVES)
        step += p_blocks
    store_block(out, memory[2].index(WHICH), done_left, MOST_ROWS, end, MOST_ROWS - end + row, left_half, left)
    store_block(out, memory[2].index(WHICH), done_right, MOST_ROWS, end, MOST_ROWS - end + row, right_half, right)
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
    memory = allocate(a.dtype, b.dtype, out.dtype, _STAGES, 0)
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
            (load_tiles, (a, b, tiles, memory, p_width, q_width, P_HALVES, Q_HALVES, False)),
        ],
        [_WARPS, 1],
        [_REGISTERS, _LOADING_REGISTERS],
    )
