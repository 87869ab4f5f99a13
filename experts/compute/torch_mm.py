"""torch.nn.functional.grouped_mm over permuted rows. No host sync for bfloat16 on SM90 and later."""

import functools

import torch
from torch import Tensor

from experts.compute import Engine, ExpertParameters
from experts.compute.whole import Plan, Products, whole_experts
from experts.config import MoEConfig, Save, dtype_name, is_gated_activation
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
    save: Save = "memory",
) -> Tensor:
    """Grouped GEMMs over rows sorted by expert. grouped_mm stops at the last offset: later rows are never read."""
    permutation = sort_by_expert(indices_TK, first, parameters.down_projs.shape[0])
    plan = Plan(permutation, config, products(permutation.offsets_L), save)
    return whole_experts(x_TD, weights_TK, parameters.to(x_TD.dtype), plan)


def products(offsets_L: Tensor) -> Products:
    """grouped_mm of rows in groups that end at the offsets."""
    multiply = functools.partial(torch.nn.functional.grouped_mm, offs=offsets_L)
    return Products(
        rows=multiply,
        rows_back=lambda a_NQ, b_LPQ: multiply(a_NQ, b_LPQ.transpose(-2, -1)),
        outer=lambda a_NP, b_NQ: multiply(a_NP.t(), b_NQ),
    )


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


ENGINE = Engine(compute, unsupported, saves=True)
