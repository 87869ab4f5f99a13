"""Compute the local experts with `torch.nn.functional.grouped_mm` over rows sorted by expert.

This is the engine `torch_mm`. For bfloat16 on SM90 and later, the host does not wait for the device.
"""

import torch
from torch import Tensor

from experts.compute import Adapters, Engine, ExpertParameters
from experts.compute.adapted import adapted_experts
from experts.compute.grouped_mm import products, unaligned
from experts.compute.whole import Plan, Products, whole_experts
from experts.config import MoEConfig, Save
from experts.errors import Unsupported
from experts.permutation import Permutation, sort_by_expert


def compute(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    config: MoEConfig,
    first: int,
    save: Save = "memory",
    adapters: Adapters | None = None,
) -> Tensor:
    """Return the local experts' sum [T, D]; see `Compute`. grouped_mm does not read rows past the last offset."""
    permutation = sort_by_expert(indices_TK, first, parameters.down_projs.shape[0])
    plan = Plan(permutation, config, products(permutation.offsets_L), save)
    if adapters is not None:
        return adapted_experts(x_TD, weights_TK, parameters.to(x_TD.dtype), adapters.to(x_TD.dtype), plan)
    return whole_experts(x_TD, weights_TK, parameters.to(x_TD.dtype), plan)


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return why grouped_mm cannot run the config, or None where it can.

    grouped_mm takes float32, bfloat16 and float16. The size of a row must be a multiple of 16 bytes.
    """
    if config is None:
        return None
    if config.dtype is torch.float64:
        return Unsupported("grouped_mm takes float32, bfloat16 and float16, not float64; use the loop")
    return unaligned(config)


def _products(permutation: Permutation) -> Products:
    return products(permutation.offsets_L)


def _own_products(permutation: Permutation, config: MoEConfig) -> Products:
    return _products(permutation)


ENGINE = Engine(compute, unsupported, saves=True, adapts=True, products=_products, own_products=_own_products)
