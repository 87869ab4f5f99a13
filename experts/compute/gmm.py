"""Compute the local experts with the library grouped_gemm over rows sorted by expert, in bfloat16 on CUDA.

This is the engine `gmm`. grouped_gemm takes the sizes of the groups on the host, so every call waits for the device.
"""

import torch
from torch import Tensor

from experts import catalog
from experts.compute import Engine, ExpertParameters
from experts.compute.grouped import no_rows
from experts.compute.whole import Plan, Products, whole_experts
from experts.config import MoEConfig, Save, dtype_name
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
) -> Tensor:
    """Return the local experts' sum [T, D]; see `Compute`. Computes only the rows of local experts."""
    parameters = parameters.to(x_TD.dtype)
    permutation = sort_by_expert(indices_TK, first, parameters.down_projs.shape[0])
    rows_per_expert = permutation.tokens_per_expert_L.cpu()
    num_rows = int(rows_per_expert.sum())
    if num_rows == 0:
        return no_rows(x_TD, (weights_TK, *parameters))
    plan = Plan(permutation.cut(num_rows), config, products(rows_per_expert), save)
    return whole_experts(x_TD, weights_TK, parameters, plan)


def products(rows_per_expert: Tensor) -> Products:
    """Return grouped_gemm's matrix products, for groups of `rows_per_expert` rows.

    rows_per_expert: [L] int64 on the host, not all zero. The matrix products make their operands contiguous.
    """
    from grouped_gemm.backend import gmm

    empty = (rows_per_expert == 0).nonzero().flatten().tolist()

    def multiply(a: Tensor, b: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
        product: Tensor = gmm(a.contiguous(), b.contiguous(), rows_per_expert, trans_a, trans_b)
        return product

    def outer(a_NP: Tensor, b_NQ: Tensor) -> Tensor:
        product_LPQ = multiply(a_NP, b_NQ, trans_a=True)
        for expert in empty:  # grouped_gemm does not write the matrix of an expert without rows
            product_LPQ[expert].zero_()
        return product_LPQ

    return Products(multiply, lambda a_NQ, b_LPQ: multiply(a_NQ, b_LPQ, trans_b=True), outer)


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return why grouped_gemm cannot run the config, or None where it can. It takes bfloat16 on CUDA."""
    try:
        import grouped_gemm  # noqa: F401
    except (ImportError, OSError) as error:
        return Unsupported(catalog.missing("grouped_gemm", error))
    if device.type != "cuda":
        return Unsupported(f"grouped_gemm needs a CUDA GPU, the device is {device.type}; use torch_mm or the loop")
    if config is not None and config.dtype is not torch.bfloat16:
        return Unsupported(f"grouped_gemm takes bfloat16, not {dtype_name(config.dtype)}; use torch_mm or the loop")
    return None


def _products(permutation: Permutation) -> Products:
    return products(permutation.tokens_per_expert_L.cpu())


ENGINE = Engine(compute, unsupported, saves=True, products=_products)
