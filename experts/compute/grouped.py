"""What the engines share that multiply rows grouped by expert: everything around the two products."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from experts.activations import accumulation_dtype, get_expert_activation_for_deepep
from experts.config import MoEConfig
from experts.permutation import Permutation, add_expert_bias, permute, permute_weights, unpermute

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
    weights_N = permute_weights(weights_TK, permutation)
    inside_N = torch.ones_like(weights_N) if config.apply_router_weight_after_down else weights_N
    h_NI = up(permute(x_TD, permutation))
    if up_bias is not None:
        h_NI = add_expert_bias(h_NI, up_bias, permutation)
    a_NI = get_expert_activation_for_deepep(config)(h_NI, inside_N)
    y_ND = down(a_NI)
    if down_bias is not None:
        y_ND = add_expert_bias(y_ND, down_bias, permutation, inside_N)
    if config.apply_router_weight_after_down:
        y_ND = (y_ND.to(accumulation_dtype(y_ND.dtype)) * weights_N.unsqueeze(-1)).to(y_ND.dtype)
    return unpermute(y_ND, permutation)


def no_rows(x_TD: Tensor, others: Iterable[Tensor | None]) -> Tensor:
    """Zeros like x [T, D] with zero gradients for x and `others`, for libraries that cannot multiply no rows.

    Only empty slices are touched, so that a NaN in x stays where it is.
    """
    out_TD = torch.zeros_like(x_TD)
    for tensor in (x_TD, *others):
        if tensor is not None:
            out_TD = out_TD + tensor.reshape(-1)[:0].sum().to(x_TD.dtype)
    return out_TD
