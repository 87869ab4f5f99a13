"""Compute the local experts around an engine's two matrix products, if autograd can differentiate these products."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts.config import MoEConfig
from experts.permutation import Permutation, combine, permute, weighted_activation

#: Rows [N, P], grouped by expert -> [N, Q]: each row times its expert's matrix. In operand and result, rows past the
#: last group may hold anything.
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
    """Return the local experts' sum [T, D] in x's dtype: permute, project up, activate, project down, combine.

    x: [T, D]; weights: [T, K]; up_bias: [L, 2I] ([L, I] ungated); down_bias: [L, D].
    """
    after = config.apply_router_weight_after_down
    h_NH = up(permute(x_TD, permutation))
    a_NI = weighted_activation(h_NH, permutation, None if after else weights_TK, up_bias, config)
    return combine(down(a_NI), permutation, weights_TK, down_bias, after)


def no_rows(x_TD: Tensor, others: Iterable[Tensor | None]) -> Tensor:
    """Return zeros like x [T, D], with zero gradients for x and `others`.

    Engines call this function if the rank has no rows and their library cannot multiply zero rows.
    """
    zeros_TD: Tensor = _NoRows.apply(x_TD, *others)
    return zeros_TD


class _NoRows(Function):
    """Zeros with zero gradients.

    Forward saves tensors, and backward reads the saved tensors although it does not need their values: checkpointing
    runs forward again only when backward reads saved tensors. A rank that did not run forward again would not take part
    in the dispatcher's collectives, and the other ranks would wait for this rank.
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
