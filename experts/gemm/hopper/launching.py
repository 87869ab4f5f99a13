"""Launch the kernels for the gradients of the weights: those of two groups of warps that multiply, or that of three."""

import torch
import triton
from torch import Tensor

from experts.gemm.hopper.accumulation import add_outer_products
from experts.gemm.hopper.descriptors import aligned, described, grouped_rows
from experts.gemm.hopper.gradients import LEFT, MULTIPLYING_WARPS, RIGHT, STEP, sum_outer_products
from experts.gemm.hopper.slabs import SLAB, WARPS, sum_outer_slabs
from experts.gemm.tiling import SLABS_COLUMNS, three_groups
from experts.steps import Permutation
from experts.steps.fused.launch import launch, multiprocessors

#: The columns of the right operand in a part of a tile, where a tile is not stored as a whole.
PART = 64


def outer(left: Tensor, right_NQ: Tensor, permutation: Permutation, gather: bool, transposed: bool = False) -> Tensor:
    """Return [L, P, Q]: the sum over each expert's rows of leftᵀ·right. With `transposed`, return [L, Q, P].

    left: [T, P] with `gather`, whose rows are the rows' tokens; else [N, P]. right: [N, Q]. Both have the same 16-bit
    dtype. An expert without rows has zeros. No row past the last group is read. Sums are in float32.
    """
    experts, width, depth = permutation.offsets_L.shape[0], left.shape[1], right_NQ.shape[1]
    shape = (experts, depth, width) if transposed else (experts, width, depth)
    if permutation.num_rows == 0:
        return torch.zeros(shape, dtype=left.dtype, device=left.device)
    out = torch.empty(shape, dtype=left.dtype, device=left.device)
    _launch(left, right_NQ, out, permutation, gather, transposed)
    return out


def add_outer(
    left: Tensor, right_NQ: Tensor, out: Tensor, permutation: Permutation, gather: bool, transposed: bool = False
) -> None:
    """Add to `out` what `outer` returns, before it is rounded.

    out: [L, P, Q] float32, or [L, Q, P] with `transposed`; contiguous, from a multiple of 16 bytes on.
    """
    if permutation.num_rows > 0:
        _launch(left, right_NQ, out, permutation, gather, transposed)


def _launch(
    left: Tensor, right_NQ: Tensor, out: Tensor, permutation: Permutation, gather: bool, transposed: bool
) -> None:
    """Launch one program per multiprocessor at most. `block` is what a program stores, or adds, at once.

    An expert without rows gets zeros, in blocks that lie in one piece in memory.
    """
    left, right_NQ = aligned(left), aligned(right_NQ)
    width, depth, add = left.shape[1], right_NQ.shape[1], out.dtype == torch.float32
    if three_groups(width):
        kernel, columns, warps, block = sum_outer_slabs, SLABS_COLUMNS, WARPS, [SLAB, PART // 2 if add else PART]
    elif add:
        kernel, columns, warps, block = add_outer_products, LEFT, MULTIPLYING_WARPS, [LEFT, PART]
    else:
        kernel, columns, warps, block = sum_outer_products, LEFT, MULTIPLYING_WARPS, [LEFT, RIGHT]
    num_tiles = out.shape[0] * triton.cdiv(width, columns) * triton.cdiv(depth, RIGHT)
    launch(
        kernel,
        (min(multiprocessors(left.device), num_tiles),),
        left,
        grouped_rows(right_NQ, [STEP, RIGHT]),
        described(out, [1, *block[::-1]] if transposed else [1, *block]),
        None if add else described(out.view(len(out), -1, PART), [1, PART, PART]),
        permutation.row_to_slot_N,
        permutation.offsets_L,
        NUM_TILES=num_tiles,
        P=width,
        Q=depth,
        K=permutation.n_activated_experts,
        GATHER=gather,
        TRANSPOSED=transposed,
        num_warps=warps,
    )
