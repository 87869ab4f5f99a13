"""torch.nn.functional.grouped_mm over permuted rows. No host sync for bfloat16 on SM90 and later."""

import torch
from torch import Tensor

from experts.compute import Engine, ExpertParameters
from experts.compute.grouped import GroupedProduct, grouped_experts
from experts.config import MoEConfig, dtype_name, is_gated_activation
from experts.errors import Unsupported
from experts.permutation import sort_by_expert

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
    gate_and_up, down, up_bias, down_bias = parameters.to(x_TD.dtype)
    permutation = sort_by_expert(indices_TK, first, gate_and_up.shape[0])

    def by(matrices: Tensor) -> GroupedProduct:
        return lambda rows: torch.nn.functional.grouped_mm(rows, matrices, offs=permutation.offsets_L)

    return grouped_experts(x_TD, weights_TK, permutation, config, by(gate_and_up), by(down), up_bias, down_bias)


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
        num_bytes = width * config.dtype.itemsize
        if num_bytes % ROW_ALIGNMENT_BYTES:
            return Unsupported(
                f"grouped_mm takes rows that are a multiple of {ROW_ALIGNMENT_BYTES} bytes, but {name} = {width} in "
                f"{dtype_name(config.dtype)} is {num_bytes}; choose a multiple of "
                f"{ROW_ALIGNMENT_BYTES // config.dtype.itemsize}, or the loop"
            )
    return None


ENGINE = Engine(compute, unsupported)
