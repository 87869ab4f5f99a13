"""Compute the local experts with torchao's MXFP8 grouped GEMM over rows sorted by expert, on SM100 and later.

This is the engine `torch_mm_mxfp8`. MXFP8 stores E4M3 values with one power-of-two scale per 32 values.
"""

import torch
from torch import Tensor

from experts import catalog
from experts.compute import Engine, ExpertParameters
from experts.compute.grouped import GroupedProduct, grouped_experts, no_rows
from experts.config import MoEConfig, dtype_name
from experts.errors import Unsupported
from experts.permutation import sort_by_expert

NEEDED_CAPABILITY = (10, 0)
SCALE_BLOCK = 32


def compute(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    config: MoEConfig,
    first: int,
) -> Tensor:
    """Return the local experts' sum [T, D]; see `Compute`.

    Computes only the rows of local experts, so the host waits for the number of these rows.
    """
    from torchao.prototype.moe_training.mxfp8_grouped_mm import _to_mxfp8_then_scaled_grouped_mm as mxfp8_grouped_mm

    parameters = parameters.to(x_TD.dtype)
    gate_and_up, down, up_bias, down_bias = parameters
    permutation = sort_by_expert(indices_TK, first, gate_and_up.shape[0])
    num_rows = int(permutation.offsets_L[-1])
    if num_rows == 0:
        return no_rows(x_TD, (weights_TK, *parameters))

    def by(matrices: Tensor) -> GroupedProduct:
        by_columns = matrices.transpose(-2, -1).contiguous().transpose(-2, -1)  # torchao quantises this layout
        return lambda rows: mxfp8_grouped_mm(
            rows.contiguous(), by_columns, offs=permutation.offsets_L, pad_token_groups_for_grouped_mm=True
        )

    rows = permutation.cut(num_rows)
    return grouped_experts(x_TD, weights_TK, rows, config, by(gate_and_up), by(down), up_bias, down_bias)


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return why MXFP8 cannot run the config, or None where it can.

    MXFP8 needs torchao and SM100 or later. It takes bfloat16. `dim` and `moe_inter_dim` must be multiples of 32.
    """
    if device.type != "cuda":
        return Unsupported(f"MXFP8 needs a CUDA GPU of SM100, the device is {device.type}; use torch_mm")
    present = torch.cuda.get_device_capability(device)
    if present < NEEDED_CAPABILITY:
        return Unsupported(f"MXFP8 needs SM100, this is SM{present[0]}{present[1]}; use torch_mm")
    try:
        import torchao.prototype.moe_training.mxfp8_grouped_mm  # noqa: F401
    except (ImportError, OSError) as error:
        return Unsupported(catalog.missing("torchao", error))
    if config is None:
        return None
    if config.dtype is not torch.bfloat16:
        return Unsupported(f"torchao's MXFP8 grouped GEMM takes bfloat16, not {dtype_name(config.dtype)}; use torch_mm")
    for name in ("dim", "moe_inter_dim"):
        size = getattr(config, name)
        if size % SCALE_BLOCK:
            return Unsupported(f"MXFP8 takes multiples of {SCALE_BLOCK}, but {name} = {size}; use torch_mm")
    return None


ENGINE = Engine(compute, unsupported)
