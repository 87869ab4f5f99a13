"""Compute the gradients of the weights in FP8 from transposed rows: the sums over each expert's blocks of rows.

See `experts.fp8.hopper` and `experts.fp8.turned`. Every expert has the same number of tiles, so a program finds its
tiles without a list. The number of steps of a tile is the number of the expert's blocks. A tile without steps is stored
as zeros.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from experts.fp8.blocks import BLOCK, num_blocks
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
    skip_steps,
    split_column,
    store_block,
)
from experts.fp8.turned import RowBlocks, TurnedRows
from experts.gemm.hopper.rounding import rounded
from experts.steps.fused.launch import launch

#: Tiles with the same columns of the right operand that follow each other; so both operands' columns stay in L2.
BAND = 8

_BLOCK, _SLAB, _BAND = gl.constexpr(BLOCK), gl.constexpr(SLAB), gl.constexpr(BAND)
_WARPS, _REGISTERS = gl.constexpr(MULTIPLYING_WARPS), gl.constexpr(MULTIPLYING_REGISTERS)
_LOADING_REGISTERS = gl.constexpr(LOADING_REGISTERS)


def outer(left: TurnedRows, right: TurnedRows, blocks: RowBlocks, out_LPQ: Tensor, halves: int) -> None:
    """Write [L, P, Q] to `out`: the sum over each expert's rows of leftᵀ·right.

    `left` has scales by column, `right` by block of columns, and Q has `halves` parts. `out` is contiguous in its last
    dimension.
    """
    experts, p, q = out_LPQ.shape
    width = q // halves
    num_tiles = experts * triton.cdiv(p, BLOCK) * triton.cdiv(halves * num_blocks(width), 2)
    programs = torch.cuda.get_device_properties(out_LPQ.device).multi_processor_count if out_LPQ.is_cuda else 1
    strides = out_LPQ.stride()
    # a dimension in front, so that it has as many as the rows' products have
    out = out_LPQ.as_strided([1, experts, p, halves, width], [experts * strides[0], *strides[:2], width, 1])
    launch(
        outer_fp8,
        (min(programs, num_tiles),),
        described(left.values.unsqueeze(1), [SLAB, 1, BLOCK]),
        left.scales,
        described(right.values.unsqueeze(1), [BLOCK, 1, BLOCK]),
        right.scales,
        described(out, [1, 1, SLAB, 1, BLOCK]),
        blocks.ends_L,
        *(num_tiles, p, width),
        Q_HALVES=halves,
        num_warps=MULTIPLYING_WARPS,
    )


@gluon.jit
def _find_tile(tile, ends, p, q_blocks):
    """Return a tile's expert, first row and pair of blocks of columns of the result, first step and number of steps."""
    p_tiles, pairs = count_blocks(p), (q_blocks + 1) // 2
    expert = tile // (p_tiles * pairs)
    tile = tile % (p_tiles * pairs)
    band = tile // (_BAND * pairs)
    tile -= band * (_BAND * pairs)
    height = gl.minimum(p_tiles - band * _BAND, _BAND)
    start = gl.load(ends + expert - 1, mask=expert > 0, other=0)
    return expert, (band * _BAND + tile % height) * _BLOCK, tile // height, start, gl.load(ends + expert) - start


@gluon.jit
def _load(
    a,
    b,
    ends,
    memory,
    num_tiles,
    p,
    q_width,
    Q_HALVES: gl.constexpr,
):
    q_blocks = count_blocks(q_width) * Q_HALVES
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _, row, pair, start, num_steps = _find_tile(tile, ends, p, q_blocks)
        left_half, left = split_column(2 * pair, q_width, Q_HALVES)
        right_half, right = split_column(gl.minimum(2 * pair + 1, q_blocks - 1), q_width, Q_HALVES)
        left += left_half * q_width
        right += right_half * q_width
        for block in range(start, start + num_steps):
            load_step(a, b, row, left, right, 0, block * _BLOCK, memory, step)
            step += 1


@gluon.jit
def _multiply(
    a_scales,
    b_scales,
    out,
    ends,
    memory,
    num_tiles,
    p,
    q_width,
    Q_HALVES: gl.constexpr,
    WHICH: gl.constexpr,
):
    q_blocks = count_blocks(q_width) * Q_HALVES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _BLOCK, 32])
    rows = gl.arange(0, _SLAB, layout=gl.SliceLayout(1, layout))
    step = 0
    # a tile is stored while the next tile is multiplied; before the first tile, nothing is stored
    done_left, done_right = no_block(out.dtype), no_block(out.dtype)
    expert, row, left_half, left, right_half, right = 0, p, 0, 0, 0, 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        next_expert, next_row, pair, start, num_steps = _find_tile(tile, ends, p, q_blocks)
        next_row += WHICH * _SLAB
        if (next_row < p) & (num_steps > 0):
            first = start.to(gl.int64)
            a_where = a_scales + first * p + gl.minimum(next_row + rows, p - 1)
            left_where = b_scales + first * q_blocks + 2 * pair
            right_where = b_scales + first * q_blocks + gl.minimum(2 * pair + 1, q_blocks - 1)
            left_sums, right_sums = multiply_tile(
                a_where, p, left_where, right_where, q_blocks, num_steps, memory, step, out, done_left, done_right,
                0, expert, row, left_half, left, right_half, right, True, WHICH
            )  # fmt: skip
            done_left, done_right = rounded(left_sums, out.dtype), rounded(right_sums, out.dtype)
        else:
            store_block(out, memory[2].index(WHICH), done_left, 0, expert, row, left_half, left)
            store_block(out, memory[2].index(WHICH), done_right, 0, expert, row, right_half, right)
            skip_steps(num_steps, memory, step, WHICH)
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
    num_tiles,
    p,
    q_width,
    Q_HALVES: gl.constexpr,
    num_warps: gl.constexpr,
):
    memory = allocate(a.dtype, b.dtype, out.dtype)
    gl.warp_specialize(
        [
            (_multiply, (a_scales, b_scales, out, ends, memory, num_tiles, p, q_width, Q_HALVES, 0)),
            (_multiply, (a_scales, b_scales, out, ends, memory, num_tiles, p, q_width, Q_HALVES, 1)),
            (_load, (a, b, ends, memory, num_tiles, p, q_width, Q_HALVES)),
        ],
        [_WARPS, 1],
        [_REGISTERS, _LOADING_REGISTERS],
    )
