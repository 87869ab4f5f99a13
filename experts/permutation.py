"""Order tokens by the expert that wants them, and bring the experts' rows back to their tokens.

Nothing here waits for the device: the permuted side always has N = T·K rows, one for every choice of every token.
The rows of the local experts (the window `first`, `count`) come first, in groups by expert; choices of no local
expert (other ranks' experts, masked tokens, indices of −1) come last, past `offsets[-1]`. Those rows hold anything:
what an engine computes there, NaN included, is read by nobody.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts.config import MoEConfig
from experts.errors import InputError
from experts.steps import Permutation, steps_on

__all__ = ["MAX_ROWS", "Permutation", "combine", "permute", "sort_by_expert", "weighted_activation"]

MAX_ROWS = torch.iinfo(torch.int32).max


def sort_by_expert(indices_TK: Tensor, first: int, count: int) -> Permutation:
    """Permutation that groups choices by expert, stable, for the local experts `first` … `first + count − 1`.

    indices_TK: [T, K] any integer dtype; −1 and experts outside of the window take no part. Raises InputError where
    T·K exceeds what int32 offsets can count.
    """
    if indices_TK.numel() > MAX_ROWS:
        raise InputError(
            f"{indices_TK.numel()} choices of {indices_TK.shape[0]} tokens exceed {MAX_ROWS}, the most that int32 "
            "offsets can count; split the tokens over several calls"
        )
    return steps_on(indices_TK.device).sort_by_expert(indices_TK, first, count)


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Rows [N, D] of the tokens in permuted order. Its gradient sums a token's rows in float32, in a fixed order.

    Rows past the last group hold anything.
    """
    rows: Tensor = _Permute.apply(x_TD, permutation)
    return rows


def weighted_activation(
    h_NH: Tensor,
    permutation: Permutation,
    weights_TK: Tensor | None,
    bias_LH: Tensor | None,
    config: MoEConfig,
) -> Tensor:
    """The weighted activation [N, I] of h + bias, each row by its expert's bias and its choice's routing weight.

    h: [N, 2I] ([N, I] ungated). Computed in float32 (float64 for float64). Gradients reach h, weights and bias.
    """
    activated: Tensor = _WeightedActivation.apply(h_NH, weights_TK, bias_LH, permutation, config)
    return activated


def combine(
    y_ND: Tensor, permutation: Permutation, weights_TK: Tensor | None, bias_LD: Tensor | None, after: bool
) -> Tensor:
    """Sum [T, D] of each token's y + weight·bias; weight·(y + bias) where the weights come `after` the projection.

    The sum is taken in float32 (float64 for float64), in the order of the choices. Gradients reach y, weights and bias.
    """
    if bias_LD is None and not after:
        weights_TK = None
    tokens: Tensor = _Combine.apply(y_ND, weights_TK, bias_LD, permutation, after)
    return tokens


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return steps_on(x_TD.device, x_TD.dtype).gather_rows(x_TD, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return steps_on(grad_ND.device, grad_ND.dtype).sum_rows(grad_ND, ctx.permutation), None


class _WeightedActivation(Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_NH: Tensor,
        weights_TK: Tensor | None,
        bias_LH: Tensor | None,
        permutation: Permutation,
        config: MoEConfig,
    ) -> Tensor:
        ctx.permutation, ctx.config = permutation, config
        ctx.save_for_backward(h_NH, weights_TK, bias_LH)
        return steps_on(h_NH.device, h_NH.dtype).activate(h_NH, permutation, weights_TK, bias_LH, config)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NI: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        h_NH, weights_TK, bias_LH = ctx.saved_tensors
        steps = steps_on(h_NH.device, h_NH.dtype)
        grad_h_NH, _, grad_weights_TK = steps.activate_backward(
            h_NH, grad_NI, ctx.permutation, weights_TK, bias_LH, ctx.config, again=False
        )
        grad_bias_LH = None if bias_LH is None else steps.sum_by_expert(grad_h_NH, ctx.permutation)
        if grad_weights_TK is not None:
            grad_weights_TK = grad_weights_TK.to(weights_TK.dtype)
        return grad_h_NH, grad_weights_TK, grad_bias_LH, None, None


class _Combine(Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_ND: Tensor,
        weights_TK: Tensor | None,
        bias_LD: Tensor | None,
        permutation: Permutation,
        after: bool,
    ) -> Tensor:
        ctx.permutation = permutation
        ctx.after = after
        ctx.save_for_backward(y_ND if after else None, weights_TK, bias_LD)
        return steps_on(y_ND.device, y_ND.dtype).sum_rows(y_ND, permutation, weights_TK, bias_LD, after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        y_ND, weights_TK, bias_LD = ctx.saved_tensors
        permutation: Permutation = ctx.permutation
        steps = steps_on(grad_TD.device, grad_TD.dtype)
        grad_ND = steps.gather_rows(grad_TD, permutation, weights_TK if ctx.after else None)
        grad_weights_TK = grad_bias_LD = None
        if weights_TK is not None:
            grad_weights_TK = steps.dot_rows(grad_TD, permutation, y_ND, bias_LD).to(weights_TK.dtype)
        if bias_LD is not None:
            grad_bias_LD = steps.sum_by_expert(grad_ND, permutation, None if ctx.after else weights_TK)
        return grad_ND, grad_weights_TK, grad_bias_LD, None, None
