"""Sort rows of tokens by expert, and sum the experts' rows back into tokens, with autograd.

The functions do not wait for the device, because the permuted tensors always have N = T·K rows, one per choice of a
token.
The rows of the local experts, `first` … `first + count − 1`, come first, in groups by expert. Choices without a local
expert (experts of other ranks, masked tokens, indices of −1) come last, from row `offsets[-1]` on. These last rows may
hold anything, even NaN, and no function reads these rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts.autocast import without_autocast
from experts.config import MoEConfig
from experts.errors import InputError
from experts.steps import Permutation, steps_on

__all__ = ["MAX_ROWS", "Permutation", "combine", "permute", "sort_by_expert", "weighted_activation"]

MAX_ROWS = torch.iinfo(torch.int32).max


def sort_by_expert(indices_TK: Tensor, first: int, count: int) -> Permutation:
    """Return the permutation that groups choices by expert, for the local experts `first` … `first + count − 1`.

    The sort is stable. indices_TK: [T, K] of any integer dtype. Choices of −1 and of other experts are not in a group.
    Raises InputError if T·K is larger than int32 offsets can count.
    """
    if indices_TK.numel() > MAX_ROWS:
        raise InputError(
            f"{indices_TK.numel()} choices of {indices_TK.shape[0]} tokens exceed {MAX_ROWS}, the most that int32 "
            "offsets can count; split the tokens over several calls"
        )
    return steps_on(indices_TK.device).sort_by_expert(indices_TK, first, count)


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Return the tokens' rows [N, D] in permuted order, in x's dtype.

    The gradient of a token is the sum of its rows' gradients, in float32 (float64 for float64) and in a fixed order.
    Rows past the last group may hold anything.
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
    """Return the weighted activation [N, I] of h + bias, in h's dtype.

    Each row gets the bias of its expert and the routing weight of its choice. If `weights_TK` is None, every routing
    weight is 1.
    h: [N, 2I] ([N, I] ungated); weights: [T, K]; bias: [L, 2I] ([L, I] ungated). The activation is computed in float32
    (float64 for float64). Gradients flow to h, weights and bias.
    """
    activated: Tensor = _WeightedActivation.apply(h_NH, weights_TK, bias_LH, permutation, config)
    return activated


def combine(
    y_ND: Tensor, permutation: Permutation, weights_TK: Tensor | None, bias_LD: Tensor | None, after: bool
) -> Tensor:
    """Return the sum [T, D] over each token's choices, in y's dtype.

    Each term of the sum is y + weight·bias. With `after`, the routing weight is applied after the down projection, and
    each term is weight·(y + bias).
    y: [N, D]; weights: [T, K]; bias: [L, D]. The sum is taken in float32 (float64 for float64), in the order of the
    choices. Gradients flow to y, weights and bias.
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
    @without_autocast
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
    @without_autocast
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
    @without_autocast
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
