"""Compute the local experts with the library grouped_gemm over rows sorted by expert, in bfloat16 on CUDA.

This is the engine `gmm`. grouped_gemm takes the sizes of the groups on the host, so every call waits for the device. If
all experts are local, the host hands over the first gather of rows before it waits, and the device has work meanwhile.
"""

import functools

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
    """Return the local experts' sum [T, D]; see `Compute`.

    If some experts are on other ranks, computes only the rows of local experts.
    """
    parameters = parameters.to(x_TD.dtype)
    num_local_experts = parameters.down_projs.shape[0]
    permutation = sort_by_expert(indices_TK, first, num_local_experts)
    sizes = Sizes(permutation.tokens_per_expert_L)
    if num_local_experts < config.n_routed_experts:
        permutation = permutation.cut(sizes.total)
    if permutation.num_rows == 0:
        return no_rows(x_TD, (weights_TK, *parameters))
    plan = Plan(permutation, config, products(sizes), save)
    return whole_experts(x_TD, weights_TK, parameters, plan)


class Sizes:
    """The number of rows of each group. The copy to the host starts at once, and the first use waits for the copy."""

    def __init__(self, sizes_L: Tensor) -> None:
        waits_later = sizes_L.is_cuda
        self._sizes_L = sizes_L.to("cpu", non_blocking=waits_later)  # torch pins memory for a copy that does not wait
        self._copied = torch.cuda.current_stream(sizes_L.device).record_event() if waits_later else None

    @functools.cached_property
    def on_host(self) -> Tensor:
        """The sizes [L], int64."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._sizes_L

    @functools.cached_property
    def total(self) -> int:
        """The number of rows of all groups."""
        return int(self.on_host.sum())

    @functools.cached_property
    def empty(self) -> list[int]:
        """The groups without rows."""
        empty: list[int] = (self.on_host == 0).nonzero().flatten().tolist()
        return empty


def products(sizes: Sizes) -> Products:
    """Return grouped_gemm's matrix products. They make their operands contiguous.

    The library asserts that there are rows, so the products do not call it if every group is empty.
    """
    from grouped_gemm.backend import gmm

    def multiply(a_NP: Tensor, b: Tensor, trans_b: bool = False) -> Tensor:
        if sizes.total == 0:
            return a_NP.new_empty(a_NP.shape[0], b.shape[1 if trans_b else 2])
        product: Tensor = gmm(a_NP.contiguous(), b.contiguous(), sizes.on_host, False, trans_b)
        return product

    def outer(a_NP: Tensor, b_NQ: Tensor) -> Tensor:
        if sizes.total == 0:
            return a_NP.new_zeros(len(sizes.empty), a_NP.shape[1], b_NQ.shape[1])
        product_LPQ: Tensor = gmm(a_NP.contiguous(), b_NQ.contiguous(), sizes.on_host, True, False)
        for expert in sizes.empty:  # grouped_gemm does not write the matrix of an expert without rows
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
    return products(Sizes(permutation.tokens_per_expert_L))


ENGINE = Engine(compute, unsupported, saves=True, products=_products)
