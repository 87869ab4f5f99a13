"""grouped_gemm.ops.gmm over permuted rows: bfloat16 on CUDA. Its group sizes live on the host, so every call waits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts.compute import Engine, ExpertParameters
from experts.compute.grouped import GroupedProduct, grouped_experts, no_rows
from experts.config import MoEConfig, dtype_name
from experts.errors import Unsupported
from experts.permutation import sort_by_expert


def compute(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    config: MoEConfig,
    first: int,
) -> Tensor:
    """Two grouped GEMMs over rows sorted by expert, and over no others."""
    from grouped_gemm.ops import gmm

    parameters = parameters.to(x_TD.dtype)
    gate_and_up, down, up_bias, down_bias = parameters
    permutation = sort_by_expert(indices_TK, first, gate_and_up.shape[0])
    rows_per_expert = permutation.tokens_per_expert_L.cpu()
    num_rows = int(rows_per_expert.sum())
    if num_rows == 0:
        return no_rows(x_TD, (weights_TK, *parameters))
    empty = (rows_per_expert == 0).nonzero().flatten().tolist()

    def by(matrices: Tensor) -> GroupedProduct:
        written = _ZeroGradientOfEmpty.apply(matrices.contiguous(), empty)
        return lambda rows: gmm(rows.contiguous(), written, rows_per_expert)

    rows = permutation.cut(num_rows)
    return grouped_experts(x_TD, weights_TK, rows, config, by(gate_and_up), by(down), up_bias, down_bias)


class _ZeroGradientOfEmpty(Function):
    """Identity. gmm leaves the gradient of an expert without rows unwritten; this writes its zeros."""

    @staticmethod
    def forward(ctx: Any, matrices_LPQ: Tensor, empty: list[int]) -> Tensor:
        ctx.empty = empty
        return matrices_LPQ.view_as(matrices_LPQ)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LPQ: Tensor) -> tuple[Tensor, None]:
        for expert in ctx.empty:  # in place: gmm has just made this gradient, and nobody else holds it
            grad_LPQ[expert].zero_()
        return grad_LPQ, None


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """grouped_gemm takes bfloat16 on CUDA."""
    try:
        import grouped_gemm  # noqa: F401
    except (ImportError, OSError) as error:
        return Unsupported(f"grouped_gemm does not import ({error}); pip install 'moebench[gmm]'")
    if device.type != "cuda":
        return Unsupported(f"grouped_gemm needs a CUDA GPU, the device is {device.type}; use torch_mm or the loop")
    if config is not None and config.dtype is not torch.bfloat16:
        return Unsupported(f"grouped_gemm takes bfloat16, not {dtype_name(config.dtype)}; use torch_mm or the loop")
    return None


ENGINE = Engine(compute, unsupported)
