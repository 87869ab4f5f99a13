"""What the engines share whose products bring a backward of their own: everything around the two products."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

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
    """Zeros like x [T, D] with zero gradients for x and `others`, for libraries that cannot multiply no rows.

    Only empty slices are touched, so that a NaN in x stays where it is.
    """
    out_TD = torch.zeros_like(x_TD)
    for tensor in (x_TD, *others):
        if tensor is not None:
            out_TD = out_TD + tensor.reshape(-1)[:0].sum().to(x_TD.dtype)
    return out_TD
