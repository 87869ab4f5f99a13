"""Multiply rows in FP8, grouped by expert, by their experts' matrices in FP8. The host does not wait for the device."""

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from experts.activations import ActivationForm
from experts.fp8.blocks import BLOCK, Matrices, Rows, num_blocks
from experts.fp8.kernels import fp8_gemm
from experts.gemm.gradients import runs_on_hopper
from experts.gemm.lists import tiles_and_programs
from experts.gemm.tiling import FEW_ROWS, Limits, limits_for
from experts.steps import Permutation
from experts.steps.fused.launch import launch


@dataclass(frozen=True)
class Tiling:
    """How a product is computed, in tiles of 128 columns. See `experts.gemm.tiling.Tiling`."""

    rows: int
    stages: int = 3
    warps: int = 8
    listed: bool = True
    #: Whether the kernel for Hopper computes it.
    hopper: bool = False


HOPPER = Tiling(192, 4, 4, listed=True, hopper=True)
#: The same for the up projection with its activation, whose tiles have 128 columns of gate and of up.
HOPPER_PAIRS = replace(HOPPER, rows=128)


def tiling_for(rows_per_expert: float) -> Tiling:
    """Return the tiling for an average of `rows_per_expert`."""
    if rows_per_expert <= 24:
        return Tiling(16 if rows_per_expert <= 12 else 32, 4, 4, listed=False)
    if rows_per_expert <= FEW_ROWS:
        return Tiling(64, 4, 4, listed=False)
    return Tiling(128, 4, 8)


def product(
    rows: Rows,
    matrices: Matrices,
    permutation: Permutation,
    rows_per_expert: float,
    dtype: torch.dtype,
    gather: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """Return [N, Q] in `dtype`: each row times the transpose of its expert's matrix [Q, P]. Sums are in float32.

    With `gather`, `rows` are tokens [T, P], and each row is its token. Rows past the last group stay unwritten.
    """
    out = torch.empty(permutation.num_rows, matrices.values.shape[1], dtype=dtype, device=rows.values.device)
    if permutation.num_rows == 0:
        return out
    whole_tiles = runs_on_hopper(out.device, permutation.num_rows) and not gather
    large = HOPPER if whole_tiles else tiling_for(math.inf)
    if tiling is None:
        tiling = tiling_for(rows_per_expert)
        tiling = large if tiling.listed else tiling
    limits = limits_for(tiling.rows, tiling.listed, rows_per_expert, permutation.num_tokens)
    tilings = [tiling, large][: len(limits)]
    blocks = matrices.q_halves * num_blocks(out.shape[1] // matrices.q_halves)
    lists = [
        tiles_and_programs(permutation, one.rows, one.listed, blocks, limit)
        for one, limit in zip(tilings, limits, strict=True)
    ]
    tiles = lists[-1][0]  # of two launches, the first learns its number of tiles from the list
    for one, limit, (_, programs) in zip(tilings, limits, lists, strict=True):
        _multiply(rows, matrices, permutation, out, gather, one, limit, tiles, programs)
    return out


def _multiply(
    rows: Rows,
    matrices: Matrices,
    permutation: Permutation,
    out: Tensor,
    gather: bool,
    tiling: Tiling,
    limits: Limits,
    tiles: Tensor | None,
    programs: int,
) -> None:
    """Write the products of the rows of the experts within the limits."""
    experts, q, p = matrices.values.shape
    q_width, p_width = q // matrices.q_halves, p // matrices.p_halves
    if tiling.hopper:
        from experts.fp8 import hopper

        assert tiles is not None
        hopper.multiply(rows, matrices, out, tiles, programs)
        return
    a = rows.values if gather else described(rows.values.view(-1, matrices.p_halves, p_width), [tiling.rows, 1, BLOCK])
    launch(
        fp8_gemm,
        (programs,),
        *(a, rows.scales),
        described(matrices.values.view(experts, q, matrices.p_halves, p_width), [1, BLOCK, 1, BLOCK]),
        *(matrices.scales, out, permutation.row_to_slot_N, permutation.offsets_L, tiles, rows.scales.shape[1]),
        EXPERTS=experts,
        P_WIDTH=p_width,
        P_HALVES=matrices.p_halves,
        P_BLOCKS=num_blocks(p_width),
        Q_WIDTH=q_width,
        Q_HALVES=matrices.q_halves,
        Q_BLOCKS=num_blocks(q_width),
        K=permutation.n_activated_experts,
        LISTED=tiling.listed,
        GATHER=gather,
        BINS=triton.next_power_of_2(experts),
        ROWS=tiling.rows,
        MOST=limits.most,
        num_stages=tiling.stages,
        num_warps=tiling.warps,
    )


def activated_product(
    rows: Rows,
    up: Matrices,
    permutation: Permutation,
    rows_per_expert: float,
    weights_TK: Tensor | None,
    form: ActivationForm,
    dtype: torch.dtype,
) -> Rows | None:
    """Return the weighted activation [N, I] of the up projection in FP8, or None where no kernel computes both.

    `dtype` is the one in which the up projection would be stored. It takes Hopper GPUs, many rows, and gate and up in
    halves.
    """
    tiling = tiling_for(rows_per_expert)
    fits = form.gated and not form.interleaved and tiling.listed
    if not fits or permutation.num_rows == 0 or not runs_on_hopper(rows.values.device, permutation.num_rows):
        return None
    from experts.fp8 import hopper

    blocks = num_blocks(up.values.shape[1] // 2)
    tiles, programs = tiles_and_programs(permutation, HOPPER_PAIRS.rows, HOPPER_PAIRS.listed, blocks)
    assert tiles is not None
    return hopper.multiply_and_activate(rows, up, permutation.row_to_slot_N, weights_TK, form, tiles, programs, dtype)


def described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Return the descriptor that reads blocks of a contiguous tensor."""
    return TensorDescriptor.from_tensor(tensor, block)
