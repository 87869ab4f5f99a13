"""Compute the gradients of the weights in FP8 from transposed rows: the sums over each expert's blocks of rows.

See `experts.fp8.hopper` and `experts.fp8.turned`. Every expert has the same number of tiles, so a program finds its
tiles without a list. The number of steps of a tile is the number of the expert's blocks. A tile without steps is stored
as zeros.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from experts.fp8.blocks import BLOCK, num_blocks
from experts.fp8.hopper.steps import (
    LOADING_REGISTERS,
    REGISTERS_OF_TWO,
    SLAB,
    WARPS,
    allocate,
    count_blocks,
    described,
    is_kept,
    load_step,
    multiply_pair,
    no_block,
    skip_steps,
    split_column,
    store_block,
)
from experts.fp8.turned import RowBlocks, TurnedRows
from experts.gemm.hopper.rounding import rounded
from experts.steps.fused.launch import launch, multiprocessors

#: Steps whose operands are in shared memory at the same time, and further steps whose left operand stays there.
STAGES, KEPT = 3, 3

_BLOCK, _SLAB = gl.constexpr(BLOCK), gl.constexpr(SLAB)
_STAGES, _KEPT = gl.constexpr(STAGES), gl.constexpr(KEPT)
_WARPS, _REGISTERS = gl.constexpr(WARPS), gl.constexpr(REGISTERS_OF_TWO)
_LOADING_REGISTERS = gl.constexpr(LOADING_REGISTERS)


def outer(left: TurnedRows, right: TurnedRows, blocks: RowBlocks, out_LPQ: Tensor, halves: int) -> None:
    """Write [L, P, Q] to `out`: the sum over each expert's rows of leftᵀ·right.

    `left` has scales by column, `right` by block of columns, and Q has `halves` parts. `out` is contiguous in its last
    dimension.
    """
    experts, p, q = out_LPQ.shape
    width = q // halves
    bands, pairs = experts * triton.cdiv(p, BLOCK), triton.cdiv(halves * num_blocks(width), 2)
    strides = out_LPQ.stride()
    # a dimension in front, so that it has as many as the rows' products have
    out = out_LPQ.as_strided([1, experts, p, halves, width], [experts * strides[0], *strides[:2], width, 1])
    launch(
        outer_fp8,
        (min(multiprocessors(out_LPQ.device), bands * pairs),),
        described(left.values.transpose(0, 1), [SLAB, 1, BLOCK]),
        left.scales,
        described(right.values.transpose(0, 1), [BLOCK, 1, BLOCK]),
        right.scales,
        described(out, [1, 1, SLAB, 1, BLOCK]),
        blocks.ends_L,
        *(bands, p, width),
        Q_HALVES=halves,
        num_warps=WARPS,
    )


@gluon.jit
def _count_pairs(q_width, Q_HALVES: gl.constexpr):
    """Return how many pairs of blocks of columns a band of tiles has."""
    return (count_blocks(q_width) * Q_HALVES + 1) // 2


@gluon.jit
def _share_of_rest(num_bands, pairs):
    """Return the number of rounds of whole bands, and the first pair of this program's share of the rest, and its end.

    Each program has a whole band in a round. What is left is fewer bands than programs, and each program has the same
    number of its pairs.
    """
    programs, program = gl.num_programs(0), gl.program_id(0)
    rounds = num_bands // programs
    rest = (num_bands - rounds * programs) * pairs
    return rounds, program * rest // programs, (program + 1) * rest // programs


@gluon.jit
def _count_bands(num_bands, pairs):
    """Return of how many bands this program has some pairs."""
    rounds, first, end = _share_of_rest(num_bands, pairs)
    return rounds + (end + pairs - 1) // pairs - first // pairs - (first == end).to(gl.int32) * (first % pairs > 0)


@gluon.jit
def _find_band(number, num_bands, pairs, ends, p):
    """Return what the tiles of a program's band share: expert, first row, first step and number of steps.

    Also return the program's first pair of blocks of columns of the band, and the end of its pairs. Bands with the same
    columns follow each other, so the columns stay in L2.
    """
    rounds, first, end = _share_of_rest(num_bands, pairs)
    band = number * gl.num_programs(0) + gl.program_id(0)
    first_pair, end_pair = 0, pairs
    if number >= rounds:
        of_rest = first // pairs + number - rounds
        band = rounds * gl.num_programs(0) + of_rest
        first_pair = gl.maximum(first - of_rest * pairs, 0)
        end_pair = gl.minimum(end - of_rest * pairs, pairs)
    p_tiles = count_blocks(p)
    expert = band // p_tiles
    start = gl.load(ends + expert - 1, mask=expert > 0, other=0)
    num_steps = gl.load(ends + expert) - start
    return expert, band % p_tiles * _BLOCK, start, num_steps, first_pair, end_pair


@gluon.jit
def _load(
    a,
    b,
    ends,
    memory,
    num_bands,
    p,
    q_width,
    Q_HALVES: gl.constexpr,
):
    q_blocks, pairs = count_blocks(q_width) * Q_HALVES, _count_pairs(q_width, Q_HALVES)
    step = 0
    for number in range(_count_bands(num_bands, pairs)):
        _, row, start, num_steps, first_pair, end_pair = _find_band(number, num_bands, pairs, ends, p)
        for pair in range(first_pair, end_pair):
            left_half, left = split_column(2 * pair, q_width, Q_HALVES)
            right_half, right = split_column(gl.minimum(2 * pair + 1, q_blocks - 1), q_width, Q_HALVES)
            left += left_half * q_width
            right += right_half * q_width
            for index in range(num_steps):
                fresh = (pair == first_pair) | (is_kept(index, num_steps, _STAGES, _KEPT) == 0)
                load_step(a, b, row, 2, left, right, start + index, 0, memory, step, index, num_steps, fresh, 2)
                step += 1


@gluon.jit
def _multiply(
    a_scales,
    b_scales,
    out,
    ends,
    memory,
    num_bands,
    p,
    q_width,
    Q_HALVES: gl.constexpr,
    WHICH: gl.constexpr,
):
    q_blocks, pairs = count_blocks(q_width) * Q_HALVES, _count_pairs(q_width, Q_HALVES)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _BLOCK, 32])
    rows = gl.arange(0, _SLAB, layout=gl.SliceLayout(1, layout))
    step = 0
    # a tile is stored while the next tile is multiplied; before the first tile, nothing is stored
    done_left, done_right = no_block(out.dtype), no_block(out.dtype)
    expert, row, left_half, left, right_half, right = 0, p, 0, 0, 0, 0
    for number in range(_count_bands(num_bands, pairs)):
        next_expert, next_row, start, num_steps, first_pair, end_pair = _find_band(number, num_bands, pairs, ends, p)
        next_row += WHICH * _SLAB
        first = start.to(gl.int64)
        a_where = a_scales + first * p + gl.minimum(next_row + rows, p - 1)
        for pair in range(first_pair, end_pair):
            if (next_row < p) & (num_steps > 0):
                left_where = b_scales + first * q_blocks + 2 * pair
                right_where = b_scales + first * q_blocks + gl.minimum(2 * pair + 1, q_blocks - 1)
                left_sums, right_sums = multiply_pair(
                    a_where, p, left_where, right_where, q_blocks, num_steps, memory, step, out, done_left, done_right,
                    0, expert, row, left_half, left, right_half, right, True, WHICH
                )  # fmt: skip
                done_left, done_right = rounded(left_sums, out.dtype), rounded(right_sums, out.dtype)
            else:
                store_block(out, memory[2].index(WHICH), done_left, 0, expert, row, left_half, left)
                store_block(out, memory[2].index(WHICH), done_right, 0, expert, row, right_half, right)
                skip_steps(num_steps, memory, step, WHICH, True)
                done_left, done_right = no_block(out.dtype), no_block(out.dtype)
            expert, row = next_expert, next_row
            left_half, left = split_column(2 * pair, q_width, Q_HALVES)
            right_half, right = split_column(2 * pair + 1, q_width, Q_HALVES)
            step += num_steps
    store_block(out, memory[2].index(WHICH), done_left, 0, expert, row, left_half, left)
    store_block(out, memory[2].index(WHICH), done_right, 0, expert, row, right_half, right)
    tma.store_wait(0)


@gluon.jit
def outer_fp8(
    a,
    a_scales,
    b,
    b_scales,
    out,
    ends,
    num_bands,
    p,
    q_width,
    Q_HALVES: gl.constexpr,
    num_warps: gl.constexpr,
):
    memory = allocate(a.dtype, b.dtype, out.dtype, 2, 2, _STAGES, _KEPT)
    gl.warp_specialize(
        [
            (
                _multiply,
                (a_scales, b_scales, out, ends, memory, num_bands, p, q_width, Q_HALVES, 0),
            ),
            (
                _multiply,
                (a_scales, b_scales, out, ends, memory, num_bands, p, q_width, Q_HALVES, 1),
            ),
            (_load, (a, b, ends, memory, num_bands, p, q_width, Q_HALVES)),
        ],
        [_WARPS, 1],
        [_REGISTERS, _LOADING_REGISTERS],
    )
