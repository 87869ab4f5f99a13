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
    add_steps,
    allocate,
    count_blocks,
    described,
    load_step,
    skip_steps,
    split_column,
    to_shared,
)
from experts.fp8.turned import RowBlocks, TurnedRows
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
    out = out_LPQ.as_strided([experts, p, halves, width], [*strides[:2], width, 1])
    launch(
        outer_fp8,
        (min(programs, num_tiles),),
        described(left.values.unsqueeze(1), [SLAB, 1, BLOCK]),
        left.scales,
        described(right.values.unsqueeze(1), [BLOCK, 1, BLOCK]),
        right.scales,
        described(out, [1, SLAB, 1, BLOCK]),
        blocks.ends_L,
        *(blocks.most, num_tiles, p, width),
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
def _store(out, sums, result, expert, row, block, q_width, Q_HALVES: gl.constexpr):
    half, column = split_column(block, q_width, Q_HALVES)
    to_shared(sums, result)
    source = result._reinterpret(out.dtype, [1, _SLAB, 1, _BLOCK], out.layout)
    tma.async_copy_shared_to_global(out, [expert, row, half, column], source)


@gluon.jit
def _multiply(
    a_scales,
    b_scales,
    out,
    ends,
    memory,
    most_blocks,
    num_tiles,
    p,
    q_width,
    Q_HALVES: gl.constexpr,
    WHICH: gl.constexpr,
):
    q_blocks = count_blocks(q_width) * Q_HALVES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _BLOCK, 32])
    rows = gl.arange(0, _SLAB, layout=gl.SliceLayout(1, layout))
    result = memory[2].index(WHICH)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, row, pair, start, num_steps = _find_tile(tile, ends, p, q_blocks)
        row += WHICH * _SLAB
        if row < p:
            first = gl.minimum(start, most_blocks - 1).to(gl.int64)  # an expert without blocks may be the last one
            a_where = a_scales + first * p + gl.minimum(row + rows, p - 1)
            b_where = b_scales + first * q_blocks
            right_where = b_where + gl.minimum(2 * pair + 1, q_blocks - 1)
            left, right = add_steps(
                a_where, p, b_where + 2 * pair, right_where, q_blocks, num_steps, memory, step, WHICH
            )
            _store(out, left, result, expert, row, 2 * pair, q_width, Q_HALVES)
            if 2 * pair + 1 < q_blocks:
                _store(out, right, result, expert, row, 2 * pair + 1, q_width, Q_HALVES)
        else:
            skip_steps(num_steps, memory, step, WHICH)
        step += num_steps
    tma.store_wait(0)


@gluon.jit
def outer_fp8(
    a,
    a_scales,
    b,
    b_scales,
    out,
    ends,
    most_blocks,
    num_tiles,
    p,
    q_width,
    Q_HALVES: gl.constexpr,
    num_warps: gl.constexpr,
):
    memory = allocate(a.dtype, b.dtype, out.dtype)
    gl.warp_specialize(
        [
            (_multiply, (a_scales, b_scales, out, ends, memory, most_blocks, num_tiles, p, q_width, Q_HALVES, 0)),
            (_multiply, (a_scales, b_scales, out, ends, memory, most_blocks, num_tiles, p, q_width, Q_HALVES, 1)),
            (_load, (a, b, ends, memory, num_tiles, p, q_width, Q_HALVES)),
        ],
        [_WARPS, 1],
        [_REGISTERS, _LOADING_REGISTERS],
    )
