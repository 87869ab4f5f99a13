"""Add the gradients of the weights to float32 gradients that are there already: aᵀ·b of each expert's rows.

A program adds one tile. The rows of either operand can be gathered from tokens in place. No function waits for the
device. No row past the last group is read, and the gradient of an expert without rows is left as it is. Each number of
the gradient gets one addition from a call, so the results of the same calls have the same bits. Sums are in float32.

On Hopper GPUs, `experts.gemm.hopper` computes the same.
"""

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from experts.gemm.gradients import runs_on_hopper
from experts.steps import Permutation
from experts.steps.fused.launch import launch

#: The operand whose rows are gathered from tokens, or None if both are in permuted order.
Gathered = Literal["left", "right"]
#: Columns of the two operands, and rows of a step: the sizes of a tile. They were not measured.
LEFT, RIGHT, STEP = 128, 128, 32
STAGES, WARPS = 4, 8
#: The tensor memory accelerator adds to memory from a multiple of this many bytes on.
ALIGNMENT_BYTES = 16


def add_outer(
    left: Tensor, right: Tensor, out_LPQ: Tensor, permutation: Permutation, gathered: Gathered | None = None
) -> None:
    """Add to out [L, P, Q] the sum over each expert's rows of leftᵀ·right, which is not rounded first.

    left: [N, P], or the tokens [T, P] if `gathered` is "left". right: [N, Q], or the tokens [T, Q] if it is "right".
    Both have the same dtype. out must be contiguous, in float32.
    """
    if permutation.num_rows == 0:
        return
    if runs_on_hopper(left.device, permutation.num_rows) and out_LPQ.data_ptr() % ALIGNMENT_BYTES == 0:
        from experts.gemm import hopper

        if gathered == "right":
            hopper.add_outer(right, left, out_LPQ, permutation, gather=True, transposed=True)
        else:
            hopper.add_outer(left, right, out_LPQ, permutation, gather=gathered == "left")
        return
    experts, p, q = out_LPQ.shape
    launch(
        add_outer_products,
        (experts * triton.cdiv(p, LEFT) * triton.cdiv(q, RIGHT),),
        left.contiguous(),
        right.contiguous(),
        out_LPQ,
        permutation.row_to_slot_N,
        permutation.offsets_L,
        P=p,
        Q=q,
        K=permutation.n_activated_experts,
        GATHER_LEFT=gathered == "left",
        GATHER_RIGHT=gathered == "right",
        LEFT=LEFT,
        RIGHT=RIGHT,
        STEP=STEP,
        num_stages=STAGES,
        num_warps=WARPS,
    )


@triton.jit
def _load_rows(rows, row, token, valid, columns, WIDTH: tl.constexpr, GATHER: tl.constexpr):
    source = token if GATHER else row
    inside = valid[:, None] & (columns < WIDTH)[None, :]
    return tl.load(rows + source.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)


@triton.jit
def add_outer_products(
    left,
    right,
    out,
    row_to_slot,
    offsets,
    P: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    STEP: tl.constexpr,
):
    right_tiles: tl.constexpr = (Q + RIGHT - 1) // RIGHT
    tiles: tl.constexpr = (P + LEFT - 1) // LEFT * right_tiles
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    p = tile // right_tiles * LEFT + tl.arange(0, LEFT)
    q = tile % right_tiles * RIGHT + tl.arange(0, RIGHT)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    if start == end:
        return
    sums = tl.zeros([LEFT, RIGHT], dtype=tl.float32)
    for first in range(start, end, STEP):
        row = first + tl.arange(0, STEP)
        valid = row < end
        token = row
        if GATHER_LEFT or GATHER_RIGHT:
            token = tl.load(row_to_slot + row, mask=valid, other=0) // K
        left_tile = _load_rows(left, row, token, valid, p, P, GATHER_LEFT)
        right_tile = _load_rows(right, row, token, valid, q, Q, GATHER_RIGHT)
        sums = tl.dot(left_tile.T, right_tile, sums)
    where = out + expert.to(tl.int64) * P * Q + p.to(tl.int64)[:, None] * Q + q[None, :]
    inside = (p < P)[:, None] & (q < Q)[None, :]
    tl.store(where, tl.load(where, mask=inside, other=0.0) + sums, mask=inside)
