"""Compute the local experts with matrix products in FP8 of this package, `experts.fp8`.

This is the engine `triton_fp8`. Operands are E4M3 with a float32 scale a block: 1 × 128 values of an activation or
gradient, 128 × 128 values of a weight. All products are in FP8. Those for the gradients of the weights can be in x's
dtype, as those of the engine `triton`. docs/concepts.md defines the format. The host does not wait for the device.
"""

from typing import Literal

import torch
from torch import Tensor

from experts import catalog
from experts.compute import Engine, ExpertParameters, grouped_mm
from experts.compute.whole import Plan, Products, needs_gradients
from experts.config import MoEConfig, Save, dtype_name
from experts.errors import Unsupported
from experts.fp8.blocks import E4M3, E5M2
from experts.fp8.cache import WeightCache
from experts.permutation import Permutation, sort_by_expert

NEEDED_CAPABILITY = (8, 9)
#: SM12x has 99 KiB of shared memory per block, and the tile for many rows needs more.
TOO_SMALL_MAJOR = 12
#: The tensor memory accelerator needs rows of 16 bytes.
ROW_MULTIPLE = 16


def compute(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    config: MoEConfig,
    first: int,
    fp8_gradients: Literal["e4m3", "e5m2"] = "e4m3",
    fp8_weight_gradients: bool = True,
    save: Save = "memory",
    cache: WeightCache | None = None,
) -> Tensor:
    """Return the local experts' sum [T, D]; see `Compute`.

    `fp8_gradients` is the format of gradients of rows. `fp8_weight_gradients` is whether the products for the gradients
    of the weights are in FP8. `cache` keeps the weights in FP8, with `save` "time" in the layouts of both passes.
    Without it, each product quantises its weights.
    """
    from experts.fp8.weights import FreshWeights
    from experts.fp8.whole import Fp8Plan, fp8_experts

    permutation = sort_by_expert(indices_TK, first, parameters.down_projs.shape[0])
    plan = Plan(permutation, config, _outer_products(permutation), "memory")
    parameters = parameters.to(x_TD.dtype)
    given = parameters.gate_and_up_projs.detach(), parameters.down_projs.detach(), config
    back = needs_gradients(x_TD, weights_TK, parameters)
    weights = FreshWeights(*given) if cache is None else cache.weights(*given, back=back, both=save == "time")
    gradients = E5M2 if fp8_gradients == "e5m2" else E4M3
    return fp8_experts(x_TD, weights_TK, parameters, Fp8Plan(plan, weights, gradients, fp8_weight_gradients))


def _outer_products(permutation: Permutation) -> Products:
    """Return the products for the gradients of the weights: this package's, or torch's grouped_mm where it must."""
    from experts import gemm

    products = grouped_mm.products(permutation.offsets_L)
    if not gemm.runs_on_hopper(permutation.offsets_L.device, permutation.num_rows):
        return products
    return products._replace(
        outer=lambda a_NP, b_NQ: gemm.outer(a_NP, b_NQ, permutation),
        gathered_outer=lambda x_TP, b_NQ: gemm.gathered_outer(x_TP, b_NQ, permutation),
        outer_gathered=lambda a_NP, x_TQ: gemm.outer_gathered(a_NP, x_TQ, permutation),
    )


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return why the engine cannot run the config, or None where it can.

    The engine needs a CUDA GPU of SM89 or later, except SM12x, or Triton's interpreter on a CPU. It takes bfloat16 and
    float16. `dim` and `moe_inter_dim` must be multiples of 16.
    """
    try:
        import triton
    except (ImportError, OSError) as error:
        return Unsupported(catalog.missing("triton", error))
    if device.type == "cuda":
        present = torch.cuda.get_device_capability(device)
        this = f"SM{present[0]}{present[1]}"
        if present < NEEDED_CAPABILITY:
            return Unsupported(f"FP8 needs SM89, this is {this}; use triton or torch_mm")
        if present[0] == TOO_SMALL_MAJOR:
            return Unsupported(f"the triton_fp8 engine's tiles do not fit the shared memory of {this}; use torch_mm")
    elif device.type != "cpu" or not triton.knobs.runtime.interpret:
        return Unsupported(f"the triton_fp8 engine needs a CUDA GPU, the device is {device.type}; use torch_mm")
    if config is None:
        return None
    if config.dtype not in (torch.bfloat16, torch.float16):
        return Unsupported(
            f"the triton_fp8 engine takes bfloat16 and float16, not {dtype_name(config.dtype)}; use torch_mm"
        )
    for name in ("dim", "moe_inter_dim"):
        size = getattr(config, name)
        if size % ROW_MULTIPLE:
            return Unsupported(
                f"the triton_fp8 engine takes multiples of {ROW_MULTIPLE}, but {name} = {size}; use triton or torch_mm"
            )
    return None


ENGINE = Engine(compute, unsupported, saves=True, fp8=True, fp8_formats=True)
