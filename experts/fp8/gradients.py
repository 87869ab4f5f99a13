"""Compute the gradients of the weights with matrix products in FP8.

The sums are over rows, so the operands are quantised again, along the rows (`experts.fp8.turned`). The activations and
tokens have a scale for 128 rows of a column. The gradients of rows have a scale for 128 rows of 128 columns.
"""

import torch
from torch import Tensor

from experts.fp8.blocks import BLOCK, E4M3, num_blocks
from experts.fp8.kernels import fp8_outer
from experts.fp8.products import described
from experts.fp8.turned import RowBlocks, TurnedRows, turn
from experts.gemm.gradients import runs_on_hopper
from experts.steps import Permutation
from experts.steps.fused.launch import launch

#: The output's gradient is gathered and transposed in at most this many parts.
MOST_PARTS = 7
STAGES, WARPS = 3, 8


def grad_of_up(x_TD: Tensor, grad_h: TurnedRows, permutation: Permutation, blocks: RowBlocks, halves: int) -> Tensor:
    """Return the gradient [L, D, H] of the up projection's weights. `grad_h` is that of its rows, in `halves` parts."""
    shape = permutation.offsets_L.shape[0], x_TD.shape[1], grad_h.values.shape[1]
    if permutation.num_rows == 0:
        return torch.zeros(shape, dtype=x_TD.dtype, device=x_TD.device)
    left = turn(x_TD, blocks, permutation, gather=True, by_column=True)
    out = torch.empty(shape, dtype=x_TD.dtype, device=x_TD.device)
    _outer(left, grad_h, blocks, out, halves, permutation.num_rows)
    return out


def grad_of_down(
    a: TurnedRows,
    grad_TD: Tensor,
    permutation: Permutation,
    blocks: RowBlocks,
    fmt: torch.dtype = E4M3,
    freed_columns: int = 0,
) -> Tensor:
    """Return the gradient [L, I, D] of the down projection's weights. `a` is the activation [N, I], by column.

    `freed_columns` is how many numbers a backward pass in 16 bits holds for each row, beside the activation, and frees
    before it allocates this gradient.
    """
    dim = grad_TD.shape[1]
    shape = permutation.offsets_L.shape[0], a.values.shape[1], dim
    if permutation.num_rows == 0:
        return torch.zeros(shape, dtype=grad_TD.dtype, device=grad_TD.device)
    out = torch.empty(shape, dtype=grad_TD.dtype, device=grad_TD.device)
    part = _part_of_columns(shape, permutation.num_rows, blocks.most, freed_columns)
    for start in range(0, dim, part):
        columns = slice(start, min(start + part, dim))
        right = turn(grad_TD, blocks, permutation, gather=True, by_column=False, columns=columns, dtype=fmt)
        _outer(a, right, blocks, out[:, :, columns], 1, permutation.num_rows)
        del right
    return out


def _part_of_columns(shape: tuple[int, int, int], num_rows: int, num_row_blocks: int, freed_columns: int) -> int:
    """Return how many columns of the output's gradient are transposed at a time, for a gradient [L, I, D].

    The transposed columns and the transposed activation with its scales take no more memory than a backward pass in 16
    bits needs beside the gradients of all weights, unless this would take more than MOST_PARTS parts. Such a pass needs
    the activation there. If what it frees before is larger than this gradient, it also needs the difference. Tiles have
    two blocks of columns, so a part has an even number of them.
    """
    experts, inter, dim = shape
    room_bytes = 2 * (num_rows * inter + max(0, num_rows * freed_columns - experts * inter * dim))
    pairs = (num_blocks(dim) + 1) // 2
    allowed = room_bytes // (num_row_blocks * BLOCK) - inter - 4 * inter // BLOCK
    parts = min(MOST_PARTS, -(-pairs // max(1, allowed // (2 * BLOCK))))
    return -(-pairs // parts) * 2 * BLOCK


def _outer(left: TurnedRows, right: TurnedRows, blocks: RowBlocks, out_LPQ: Tensor, halves: int, num_rows: int) -> None:
    """Write the sum of leftᵀ·right over each expert's rows; an expert without rows has zeros."""
    if runs_on_hopper(out_LPQ.device, num_rows):
        from experts.fp8 import hopper

        hopper.outer(left, right, blocks, out_LPQ, halves)
        return
    experts, p, q = out_LPQ.shape
    launch(
        fp8_outer,
        (num_blocks(p), halves * num_blocks(q // halves), experts),
        described(left.values, [1, BLOCK, BLOCK]),
        left.scales,
        described(right.values, [1, BLOCK, BLOCK]),
        *(right.scales, out_LPQ, blocks.ends_L),
        P=p,
        Q_WIDTH=q // halves,
        Q_HALVES=halves,
        Q_BLOCKS=num_blocks(q // halves),
        EXPERT_STRIDE=out_LPQ.stride(0),
        ROW_STRIDE=out_LPQ.stride(1),
        num_stages=STAGES,
        num_warps=WARPS,
    )
