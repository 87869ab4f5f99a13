"""Compute the local experts one after another in plain torch. This is the engine `loop`, the reference.

The loop shares only the activations with the other engines.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from experts.activations import accumulation_dtype, get_expert_activation_for_deepep
from experts.autocast import product, unbind
from experts.compute import Adapters, Engine, ExpertParameters
from experts.config import MoEConfig
from experts.errors import Unsupported


def expert_forward(
    x_ND: Tensor,
    weights_N: Tensor,
    expert: ExpertParameters,
    config: MoEConfig,
    product: Callable[[Tensor, Tensor], Tensor] = product,
    adapters: Adapters | None = None,
) -> Tensor:
    """Return one expert's contribution to its tokens, [N, D] in float32 (float64 for float64).

    x: [N, D]; weights: [N], the routing weights. Projections run in x's dtype. The down projection's bias is added in
    the result's dtype. A routing weight that is applied after the down projection is applied in the result's dtype.
    `product` multiplies two matrices. A caller that studies operands of lower precision passes a function that rounds
    the two matrices and multiplies them. `adapters` are those of the expert.
    """
    acc = accumulation_dtype(x_ND.dtype)
    weights_N1 = weights_N.to(acc).unsqueeze(-1)
    inside_N1 = torch.ones_like(weights_N1) if config.apply_router_weight_after_down else weights_N1
    h_NI = product(x_ND, expert.gate_and_up_projs)
    if adapters is not None:
        scaled_NR = product(x_ND, adapters.gate_and_up_A) * adapters.scale
        h_NI = h_NI + product(scaled_NR, adapters.gate_and_up_B)
    if expert.gate_up_proj_bias is not None:
        h_NI = h_NI + expert.gate_up_proj_bias
    a_NI = get_expert_activation_for_deepep(config)(h_NI, inside_N1)
    y_ND = product(a_NI, expert.down_projs).to(acc)
    if adapters is not None:
        y_ND = y_ND + product(product(a_NI, adapters.down_A) * adapters.scale, adapters.down_B).to(acc)
    if expert.down_proj_bias is not None:
        y_ND = y_ND + expert.down_proj_bias.to(acc) * inside_N1
    return y_ND * weights_N1 if config.apply_router_weight_after_down else y_ND


def split_experts(parameters: ExpertParameters) -> list[ExpertParameters]:
    """Return the parameters of each expert as views of the stacked parameters.

    `unbind` makes the views, because its backward writes one stacked gradient for all experts.
    """
    columns = [[None] * parameters[0].shape[0] if p is None else unbind(p) for p in parameters]
    return [ExpertParameters(*expert) for expert in zip(*columns, strict=True)]


def split_adapters(adapters: Adapters) -> list[Adapters]:
    """Return the adapters of each expert as views of the stacked adapters; see `split_experts`."""
    columns = [unbind(tensor) for tensor in adapters.tensors]
    return [Adapters(adapters.scale, *expert) for expert in zip(*columns, strict=True)]


def compute(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    config: MoEConfig,
    first: int,
    adapters: Adapters | None = None,
) -> Tensor:
    """Return the local experts' sum [T, D]; see `Compute`.

    Each expert's rows are gathered from a float32 copy of the tokens, and added to a float32 result (float64 for
    float64). An expert without tokens runs on zero rows, so that its gradients are zeros and not None.
    """
    x_acc_TD = x_TD.to(accumulation_dtype(x_TD.dtype))
    out_TD = torch.zeros_like(x_acc_TD)
    experts = split_experts(parameters.to(x_TD.dtype))
    of_experts = [None] * len(experts) if adapters is None else split_adapters(adapters.to(x_TD.dtype))
    for index, (expert, own) in enumerate(zip(experts, of_experts, strict=True), start=first):
        tokens_N, choices_N = torch.where(indices_TK == index)
        x_ND = x_acc_TD[tokens_N].to(x_TD.dtype)
        y_ND = expert_forward(x_ND, weights_TK[tokens_N, choices_N], expert, config, adapters=own)
        out_TD.index_add_(0, tokens_N, y_ND)
    return out_TD.to(x_TD.dtype)


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return None: the loop runs every dtype on every device."""
    return None


ENGINE = Engine(compute, unsupported, adapts=True)
