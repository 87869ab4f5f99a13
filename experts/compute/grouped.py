"""What the engines share whose products bring a backward of their own: everything around the two products."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts.config import MoEConfig
from experts.permutation import Permutation, combine, permute, weighted_activation

#: Rows [N, P], grouped by expert -> [N, Q], each by its expert's matrix. Rows past the last group may hold anything.
GroupedProduct = Callable[[Tensor], Tensor]


def grouped_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    permutation: Permutation,
    config: MoEConfig,
    up: GroupedProduct,
    down: GroupedProduct,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """Permute, project up, activate, project down, add up: the local experts' sum [T, D] in x's dtype."""
    after = config.apply_router_weight_after_down
    h_NH = up(permute(x_TD, permutation))
    a_NI = weighted_activation(h_NH, permutation, None if after else weights_TK, up_bias, config)
    return combine(down(a_NI), permutation, weights_TK, down_bias, after)


def no_rows(x_TD: Tensor, others: Iterable[Tensor | None]) -> Tensor:
    """Zeros like x [T, D] with zero gradients for x and `others`, for libraries that cannot multiply no rows."""
    zeros_TD: Tensor = _NoRows.apply(x_TD, *others)
    return zeros_TD


class _NoRows(Function):
    """Saves, and looks at in backward, what it could do without: what is saved is what makes checkpointing run forward
    again, and a rank that did not would miss the dispatcher's collectives there, in which the others wait for it.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, *others: Tensor | None) -> Tensor:
        ctx.save_for_backward(*others)
        return torch.zeros_like(x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        tensors = grad_TD, *ctx.saved_tensors
        return tuple(
            torch.zeros_like(tensor) if wanted else None
            for tensor, wanted in zip(tensors, ctx.needs_input_grad, strict=True)
        )
