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
        blocks.most,
        EXPERTS=experts,
        P=p,
        Q_WIDTH=width,
        Q_HALVES=halves,
        num_warps=MULTIPLYING_WARPS,
    )


@gluon.jit
def _find_tile(tile, ends, P: gl.constexpr, Q_BLOCKS: gl.constexpr):
    """Return a tile's expert, first row and pair of blocks of columns of the result, first step and number of steps."""
    P_TILES: gl.constexpr = (P + _BLOCK - 1) // _BLOCK
    PAIRS: gl.constexpr = (Q_BLOCKS + 1) // 2
    expert = tile // (P_TILES * PAIRS)
    tile = tile % (P_TILES * PAIRS)
    band = tile // (_BAND * PAIRS)
    tile -= band * (_BAND * PAIRS)
    height = gl.minimum(P_TILES - band * _BAND, _BAND)
    start = gl.load(ends + expert - 1, mask=expert > 0, other=0)
    return expert, (band * _BAND + tile % height) * _BLOCK, tile // height, start, gl.load(ends + expert) - start


@gluon.jit
def _load(
    a,
    b,
    ends,
    memory,
    num_tiles,
    P: gl.constexpr,
    Q_WIDTH: gl.constexpr,
    Q_HALVES: gl.constexpr,
):
    Q_BLOCKS: gl.constexpr = (Q_WIDTH + _BLOCK - 1) // _BLOCK * Q_HALVES
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _, row, pair, start, num_steps = _find_tile(tile, ends, P, Q_BLOCKS)
        left_half, left = split_column(2 * pair, Q_WIDTH)
        right_half, right = split_column(gl.minimum(2 * pair + 1, Q_BLOCKS - 1), Q_WIDTH)
        left += left_half * Q_WIDTH
        right += right_half * Q_WIDTH
        for block in range(start, start + num_steps):
            load_step(a, b, row, left, right, 0, block * _BLOCK, memory, step)
            step += 1


@gluon.jit
def _store(out, sums, result, expert, row, block, Q_WIDTH: gl.constexpr):
    half, column = split_column(block, Q_WIDTH)
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
    P: gl.constexpr,
    Q_WIDTH: gl.constexpr,
    Q_HALVES: gl.constexpr,
    WHICH: gl.constexpr,
):
    Q_BLOCKS: gl.constexpr = (Q_WIDTH + _BLOCK - 1) // _BLOCK * Q_HALVES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _BLOCK, 32])
    rows = gl.arange(0, _SLAB, layout=gl.SliceLayout(1, layout))
    result = memory[2].index(WHICH)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, row, pair, start, num_steps = _find_tile(tile, ends, P, Q_BLOCKS)
        row += WHICH * _SLAB
        if row < P:
            first = gl.minimum(start, most_blocks - 1).to(gl.int64)  # an expert without blocks may be the last one
            a_where = a_scales + first * P + gl.minimum(row + rows, P - 1)
            b_where = b_scales + first * Q_BLOCKS
            right_where = b_where + gl.minimum(2 * pair + 1, Q_BLOCKS - 1)
            left, right = add_steps(
                a_where, P, b_where + 2 * pair, right_where, Q_BLOCKS, num_steps, memory, step, WHICH
            )
            _store(out, left, result, expert, row, 2 * pair, Q_WIDTH)
            if 2 * pair + 1 < Q_BLOCKS:
                _store(out, right, result, expert, row, 2 * pair + 1, Q_WIDTH)
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
    EXPERTS: gl.constexpr,
    P: gl.constexpr,
    Q_WIDTH: gl.constexpr,
    Q_HALVES: gl.constexpr,
    num_warps: gl.constexpr,
):
    memory = allocate(a.dtype, b.dtype, out.dtype)
    Q_BLOCKS: gl.constexpr = (Q_WIDTH + _BLOCK - 1) // _BLOCK * Q_HALVES
    num_tiles = EXPERTS * ((P + _BLOCK - 1) // _BLOCK) * ((Q_BLOCKS + 1) // 2)
    gl.warp_specialize(
        [
            (_multiply, (a_scales, b_scales, out, ends, memory, most_blocks, num_tiles, P, Q_WIDTH, Q_HALVES, 0)),
            (_multiply, (a_scales, b_scales, out, ends, memory, most_blocks, num_tiles, P, Q_WIDTH, Q_HALVES, 1)),
            (_load, (a, b, ends, memory, num_tiles, P, Q_WIDTH, Q_HALVES)),
        ],
        [_WARPS, 1],
        [_REGISTERS, _LOADING_REGISTERS],
    )
