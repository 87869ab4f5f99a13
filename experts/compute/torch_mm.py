"""torch.nn.functional.grouped_mm over permuted rows. No host sync for bfloat16 on SM90 and later."""

import torch
from torch import Tensor

from experts.activations import accumulation_dtype, get_expert_activation_for_deepep
from experts.compute import Engine, ExpertParameters
from experts.config import MoEConfig, is_gated_activation
from experts.errors import Unsupported
from experts.permutation import add_expert_bias, permute, permute_weights, sort_by_expert, unpermute

ROW_ALIGNMENT_BYTES = 16


def compute(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    config: MoEConfig,
    first: int,
) -> Tensor:
    """Two grouped GEMMs over rows sorted by expert. grouped_mm stops at the last offset: later rows are never read."""
    gate_and_up, down, gate_up_bias, down_bias = parameters.to(x_TD.dtype)
    permutation = sort_by_expert(indices_TK, first, gate_and_up.shape[0])
    weights_N = permute_weights(weights_TK, permutation)
    inside_N = torch.ones_like(weights_N) if config.apply_router_weight_after_down else weights_N

    h_NI = torch.nn.functional.grouped_mm(permute(x_TD, permutation), gate_and_up, offs=permutation.offsets_L)
    if gate_up_bias is not None:
        h_NI = add_expert_bias(h_NI, gate_up_bias, permutation)
    a_NI = get_expert_activation_for_deepep(config)(h_NI, inside_N)
    y_ND = torch.nn.functional.grouped_mm(a_NI, down, offs=permutation.offsets_L)
    if down_bias is not None:
        y_ND = add_expert_bias(y_ND, down_bias, permutation, inside_N)
    if config.apply_router_weight_after_down:
        y_ND = (y_ND.to(accumulation_dtype(y_ND.dtype)) * weights_N.unsqueeze(-1)).to(y_ND.dtype)
    return unpermute(y_ND, permutation)


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """grouped_mm takes float32, bfloat16 and float16, rows a multiple of 16 bytes; nothing is padded in silence."""
    if config is None:
        return None
    if config.dtype is torch.float64:
        return Unsupported("grouped_mm takes float32, bfloat16 and float16, not float64; use the loop")
    gated = is_gated_activation(config.expert_activation)
    widths = {
        "dim": config.dim,
        "2·moe_inter_dim" if gated else "moe_inter_dim": config.moe_inter_dim * (2 if gated else 1),
        "moe_inter_dim": config.moe_inter_dim,
    }
    for name, width in widths.items():
        if width * config.dtype.itemsize % ROW_ALIGNMENT_BYTES:
            dtype = str(config.dtype).removeprefix("torch.")
            return Unsupported(
                f"grouped_mm takes rows that are a multiple of {ROW_ALIGNMENT_BYTES} bytes, but {name} = {width} in "
                f"{dtype} is {width * config.dtype.itemsize}; choose a multiple of "
                f"{ROW_ALIGNMENT_BYTES // config.dtype.itemsize}, or the loop"
            )
    return None


ENGINE = Engine(compute, unsupported)
