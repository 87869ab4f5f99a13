"""Multiply rows that are grouped by expert by their experts' matrices. The ends of the groups are only on the device.

No function of this module waits for the device, and a captured CUDA graph can replay with another routing. With few
rows per expert, the grid has as many programs as any routing could need, and programs without a tile end at once. With
many rows per expert, the grid has one program per multiprocessor, and the programs go through a list of tiles. The
tiles are in the order expert, columns, rows. So the first tile of an expert's columns reads their weights from memory,
and the tiles of the expert's other rows read the weights from the L2 cache. On GPUs with a tensor memory accelerator,
the accelerator copies the weights. Gathered rows are read from the tokens in place, but
`kept_and_activated` copies them for a wide up projection. Sums are in float32.

On Hopper GPUs, `experts.gemm.hopper` multiplies many rows. It computes SwiGLU without a limit and a bias, and its
gradients.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from experts.activations import SWIGLU, ActivationForm, activation_form
from experts.config import MoEConfig
from experts.gemm import choices, kinds
from experts.gemm.gradients import runs_on_hopper
from experts.gemm.kernels import grouped_gemm
from experts.gemm.kinds import Kind
from experts.gemm.lists import tiles_and_programs
from experts.gemm.tiling import LARGE, PAIRS, Limits, Tiling, limits_for, spread, tiling_for
from experts.steps import Permutation
from experts.steps.fused.launch import launch, multiprocessors
from experts.steps.fused.rows import gather_rows

#: From so many columns of the up projection on, a train step copies the rows of the tokens: each tile of columns would
#: gather them again. On an H200 (2026-11-30), a train step took 1.4% less time with 4096 columns, and 0.2% less with
#: 5760. With 1536 columns, a copy and the product took as long as the product that gathers.
COPIED_FROM = 4096
_PLAIN = ActivationForm(gated=False)


def product(a_NP: Tensor, b_LPQ: Tensor, permutation: Permutation, rows_per_expert: float) -> Tensor:
    """Return [N, Q]: each row of a [N, P] times its expert's matrix of b [L, P, Q], in a's dtype.

    The choice of tiles depends on the approximate average `rows_per_expert`. Rows past the last group stay unwritten.
    """
    return _multiply(a_NP, b_LPQ, permutation, rows_per_expert)


def gathered_product(x_TP: Tensor, b_LPQ: Tensor, permutation: Permutation, rows_per_expert: float) -> Tensor:
    """Return what `product` returns for each row's token. The tokens are read from x [T, P] in place."""
    return _multiply(x_TP, b_LPQ, permutation, rows_per_expert, gather=True)


def product_back(a_NQ: Tensor, b_LPQ: Tensor, permutation: Permutation, rows_per_expert: float) -> Tensor:
    """Return [N, P]: each row of a [N, Q] times the transpose of its expert's matrix of b [L, P, Q]; see `product`."""
    return _multiply(a_NQ, b_LPQ, permutation, rows_per_expert, transposed=True)


def gathered_product_back(x_TQ: Tensor, b_LPQ: Tensor, permutation: Permutation, rows_per_expert: float) -> Tensor:
    """Return what `product_back` returns for each row's token. The tokens are read from x [T, Q] in place."""
    return _multiply(x_TQ, b_LPQ, permutation, rows_per_expert, gather=True, transposed=True)


def activated_product(
    x_TD: Tensor,
    b_LDH: Tensor,
    permutation: Permutation,
    rows_per_expert: float,
    weights_TK: Tensor | None,
    bias_LH: Tensor | None,
    config: MoEConfig,
) -> Tensor:
    """Return the weighted activation [N, I] of `gathered_product`'s result plus the bias; see `Steps.activate`.

    x: [T, D]; b: [L, D, H]; weights: [T, K] or None; bias: [L, H] or None; H = 2I (ungated I). The activation is
    computed from the float32 sums of the matrix product, which are not rounded first.
    """
    form = activation_form(config)
    return _multiply(
        x_TD, b_LDH, permutation, rows_per_expert, gather=True, form=form, weights_TK=weights_TK, bias_LH=bias_LH
    )


def kept_and_activated(
    x_TD: Tensor,
    b_LDH: Tensor,
    permutation: Permutation,
    rows_per_expert: float,
    weights_TK: Tensor | None,
    bias_LH: Tensor | None,
    config: MoEConfig,
) -> tuple[Tensor, Tensor] | None:
    """Return `gathered_product`'s result [N, H] and its weighted activation [N, I]; None if no kernel returns both.

    With COPIED_FROM columns or more, the rows of the tokens are copied for the time of the call.
    """
    if bias_LH is not None or not _finishes(b_LDH, permutation, rows_per_expert, config):
        return None
    from experts.gemm import hopper

    tiles, programs = _listed(permutation, b_LDH.shape[2] // 2, PAIRS)
    gather = b_LDH.shape[2] < COPIED_FROM
    x = x_TD if gather else gather_rows(x_TD, permutation)
    return hopper.kept_and_activated(x, b_LDH, permutation, tiles, programs, weights_TK, gather)


def activated_back(
    grad_TD: Tensor,
    b_LID: Tensor,
    h_NH: Tensor,
    permutation: Permutation,
    rows_per_expert: float,
    weights_TK: Tensor,
    bias_LH: Tensor | None,
    config: MoEConfig,
) -> tuple[Tensor, Tensor] | None:
    """Overwrite h with its gradient, and return the weighted activation [N, I] and the weights' gradient [T, K].

    These are the results of `Steps.activate_backward` for `gathered_product_back`'s result. Return None, and leave h as
    it is, if no kernel computes all of them.
    """
    if bias_LH is not None or not _finishes(b_LID, permutation, rows_per_expert, config):
        return None
    if not h_NH.is_contiguous() or h_NH.data_ptr() % 16:
        return None
    from experts.gemm import hopper

    tiles, programs = _listed(permutation, b_LID.shape[1], LARGE)
    return hopper.activated_back(grad_TD, b_LID, h_NH, permutation, tiles, programs, weights_TK)


def _finishes(b_LPQ: Tensor, permutation: Permutation, rows_per_expert: float, config: MoEConfig) -> bool:
    """Return whether a kernel computes a product and what follows it.

    This follows from the rule, not from a measured choice: a choice is measured for the product alone.
    """
    return (
        permutation.num_rows > 0
        and runs_on_hopper(b_LPQ.device, permutation.num_rows)
        and activation_form(config) == SWIGLU
        and tiling_for(rows_per_expert, pairs=False) == LARGE
    )


def _multiply(
    a: Tensor,
    b_LPQ: Tensor,
    permutation: Permutation,
    rows_per_expert: float,
    gather: bool = False,
    transposed: bool = False,
    form: ActivationForm | None = None,
    weights_TK: Tensor | None = None,
    bias_LH: Tensor | None = None,
) -> Tensor:
    activate, form = form is not None, form or _PLAIN
    width = b_LPQ.shape[1 if transposed else 2]
    out = torch.empty(permutation.num_rows, width // 2 if form.gated else width, dtype=a.dtype, device=a.device)
    if permutation.num_rows == 0:
        return out
    tile: Tiling = choices.choose(_kind(gather, transposed, activate, form), b_LPQ, rows_per_expert)
    tile = spread(tile, rows_per_expert, out.shape[0], out.shape[1], multiprocessors(out.device))
    task = _Task(a, b_LPQ, out, permutation, gather, transposed, activate, form, weights_TK, bias_LH)
    limits = limits_for(tile.rows, tile.listed, rows_per_expert, permutation.num_tokens)
    tilings = [tile, PAIRS if form.gated else LARGE][: len(limits)]
    tiles, programs = zip(*map(task.tiles, tilings, limits), strict=True)
    for one, limit, number in zip(tilings, limits, programs, strict=True):
        task.run(one, limit, tiles[-1], number)  # of two launches, the first learns its number of tiles from the list
    return out


@dataclass(frozen=True)
class _Task:
    """What a product multiplies, and the output [N, Q or I], which it writes."""

    a: Tensor
    b_LPQ: Tensor
    out: Tensor
    permutation: Permutation
    gather: bool
    transposed: bool
    activate: bool
    form: ActivationForm
    weights_TK: Tensor | None
    bias_LH: Tensor | None

    def tiles(self, tile: Tiling, limits: Limits) -> tuple[Tensor | None, int]:
        """Return the list of tiles of the experts within the limits, and the number of programs."""
        column_tiles = triton.cdiv(self.out.shape[1], tile.columns)
        return tiles_and_programs(self.permutation, tile.rows, tile.listed, column_tiles, limits)

    def run(self, tile: Tiling, limits: Limits, tiles: Tensor | None, programs: int) -> None:
        """Multiply the rows of the experts within the limits."""
        if tiles is not None and runs_on_hopper(self.a.device, self.permutation.num_rows):
            if tile == LARGE and not self.activate:
                return self._multiply_on_hopper(tiles, programs)
            if tile == PAIRS and self.form == SWIGLU and self.bias_LH is None:
                return self._activate_on_hopper(tiles, programs)
        return self._multiply(tile, limits, tiles, programs)

    def _multiply(self, tile: Tiling, limits: Limits, tiles: Tensor | None, programs: int) -> None:
        form, permutation, bias_LH, weights_TK = self.form, self.permutation, self.bias_LH, self.weights_TK
        experts, depth, _ = self.b_LPQ.mT.shape if self.transposed else self.b_LPQ.shape
        width = self.out.shape[1]
        read_columns = tile.columns * (2 if form.interleaved else 1)
        weights_block = [1, read_columns, tile.depth] if self.transposed else [1, tile.depth, read_columns]
        a = self.a.contiguous()
        launch(
            grouped_gemm,
            (programs,),
            a if self.gather else described(a, [tile.rows, tile.depth]),
            described(self.b_LPQ, weights_block),
            self.out,
            *(None if given is None else given.contiguous() for given in (bias_LH, weights_TK)),
            *(permutation.row_to_slot_N, permutation.offsets_L, tiles, form.alpha, form.limit, form.offset),
            EXPERTS=experts,
            DEPTH=depth,
            WIDTH=width,
            K=permutation.n_activated_experts,
            LISTED=tile.listed,
            GATHER=self.gather,
            TRANSPOSED=self.transposed,
            ACTIVATE=self.activate,
            GATED=form.gated,
            INTERLEAVED=form.interleaved,
            GELU=form.gelu,
            LIMITED=form.limit > 0,
            WEIGHTS=weights_TK is not None,
            BIAS=bias_LH is not None,
            BINS=triton.next_power_of_2(experts),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            STEP=tile.depth,
            MOST=limits.most,
            num_stages=tile.stages,
            num_warps=tile.warps,
        )

    def _multiply_on_hopper(self, tiles: Tensor, programs: int) -> None:
        from experts.gemm import hopper

        hopper.product(self.a, self.b_LPQ, self.out, self.permutation, tiles, programs, self.gather, self.transposed)

    def _activate_on_hopper(self, tiles: Tensor, programs: int) -> None:
        from experts.gemm import hopper

        hopper.activated_product(self.a, self.b_LPQ, self.out, self.permutation, tiles, programs, self.weights_TK)


def _listed(permutation: Permutation, width: int, tile: Tiling) -> tuple[Tensor, int]:
    """Return the list of tiles for `width` columns, and the number of programs."""
    tiles, programs = tiles_and_programs(permutation, tile.rows, True, triton.cdiv(width, tile.columns))
    assert tiles is not None
    return tiles, programs


def _kind(gather: bool, transposed: bool, activate: bool, form: ActivationForm) -> Kind:
    """Return what `choices` calls this product."""
    if form.gated:
        return kinds.INTERLEAVED_PRODUCT if form.interleaved else kinds.GATED_PRODUCT
    if transposed:
        return kinds.GATHERED_PRODUCT_BACK if gather else kinds.PRODUCT_BACK
    if activate:
        return kinds.ACTIVATED_PRODUCT
    return kinds.GATHERED_PRODUCT if gather else kinds.PRODUCT


def described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Return the descriptor that reads blocks of a tensor. It needs memory that starts at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return TensorDescriptor.from_tensor(tensor.clone() if tensor.data_ptr() % 16 else tensor, block)
