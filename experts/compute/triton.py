"""Compute the local experts with this package's grouped GEMM in Triton, `experts.gemm`, in bfloat16 or float16.

This is the engine `triton`. The host does not wait for the device. Few tokens without gradients take two kernels, which
need no sorted rows. In other calls, rows are sorted by expert, and the up projection reads the tokens in place. Without
gradients, the up projection's kernel writes only the weighted activation. With gradients, it writes its output before
the activation, which backward needs. On Hopper GPUs it writes both, and the kernel of the down projection's backward
also computes the gradient of SwiGLU. There, backward reads the rows of the gradients of the weights in place. On other
GPUs, torch's grouped_mm computes these gradients from gathered copies. With main gradients, this package's kernels add
to them on every GPU.
"""

import torch
from torch import Tensor

from experts import catalog
from experts.compute import Adapters, Engine, ExpertParameters, MainGrads, grouped_mm
from experts.compute.adapted import adapted_experts
from experts.compute.whole import Plan, Products, needs_gradients, whole_experts
from experts.config import MoEConfig, Save, dtype_name
from experts.errors import Unsupported
from experts.permutation import Permutation, sort_by_expert

NEEDED_CAPABILITY = (8, 0)
#: SM12x has 99 KiB of shared memory per block, and the tile for many rows needs 104 KiB.
TOO_SMALL_MAJOR = 12


def compute(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    config: MoEConfig,
    first: int,
    save: Save = "memory",
    adapters: Adapters | None = None,
    main_grads: MainGrads | None = None,
) -> Tensor:
    """Return the local experts' sum [T, D]; see `Compute`."""
    from experts import gemm

    parameters = parameters.to(x_TD.dtype)
    few = adapters is None and gemm.takes_few(indices_TK.numel(), config)
    if few and not needs_gradients(x_TD, weights_TK, parameters):
        return gemm.few_tokens(x_TD, weights_TK, indices_TK, parameters, config, first)
    permutation = sort_by_expert(indices_TK, first, parameters.down_projs.shape[0])
    plan = Plan(permutation, config, products(permutation, config), save, main_grads)
    if adapters is not None:
        return adapted_experts(x_TD, weights_TK, parameters, adapters.to(x_TD.dtype), plan)
    return whole_experts(x_TD, weights_TK, parameters, plan)


def products(permutation: Permutation, config: MoEConfig) -> Products:
    """Return the matrix products: this package's, but torch's grouped_mm for gradients of weights where it must."""
    from experts import gemm

    rows = permutation, permutation.num_rows / config.n_routed_experts
    products = grouped_mm.products(permutation.offsets_L)
    if gemm.runs_on_hopper(permutation.offsets_L.device, permutation.num_rows):
        products = products._replace(
            outer=lambda a_NP, b_NQ: gemm.outer(a_NP, b_NQ, permutation),
            gathered_outer=lambda x_TP, b_NQ: gemm.gathered_outer(x_TP, b_NQ, permutation),
            outer_gathered=lambda a_NP, x_TQ: gemm.outer_gathered(a_NP, x_TQ, permutation),
            kept_and_activated=lambda x_TD, b_LDH, weights_TK, bias_LH: gemm.kept_and_activated(
                x_TD, b_LDH, *rows, weights_TK, bias_LH, config
            ),
            activated_back=lambda g_TD, b_LID, h_NH, weights_TK, bias_LH: gemm.activated_back(
                g_TD, b_LID, h_NH, *rows, weights_TK, bias_LH, config
            ),
        )
    return products._replace(
        rows=lambda a_NP, b_LPQ: gemm.product(a_NP, b_LPQ, *rows),
        rows_back=lambda a_NQ, b_LPQ: gemm.product_back(a_NQ, b_LPQ, *rows),
        gathered=lambda x_TP, b_LPQ: gemm.gathered_product(x_TP, b_LPQ, *rows),
        gathered_back=lambda g_TQ, b_LPQ: gemm.gathered_product_back(g_TQ, b_LPQ, *rows),
        activated=lambda x_TD, b_LDH, weights_TK, bias_LH: gemm.activated_product(
            x_TD, b_LDH, *rows, weights_TK, bias_LH, config
        ),
        add_outer=lambda a, b, out_LPQ, gathered: gemm.add_outer(a, b, out_LPQ, permutation, gathered),
    )


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return why the triton engine cannot run the config, or None where it can.

    The engine needs a CUDA GPU of SM80 or later, except SM12x, or Triton's interpreter on a CPU. It takes bfloat16 and
    float16. The size of a row must be a multiple of 16 bytes.
    """
    try:
        import triton
    except (ImportError, OSError) as error:
        return Unsupported(catalog.missing("triton", error))
    if device.type == "cuda":
        present = torch.cuda.get_device_capability(device)
        if present < NEEDED_CAPABILITY:
            return Unsupported(f"the triton engine needs SM80, this is SM{present[0]}{present[1]}; use torch_mm")
        if present[0] == TOO_SMALL_MAJOR:
            this = f"SM{present[0]}{present[1]}"
            return Unsupported(f"the triton engine's tiles do not fit the shared memory of {this}; use torch_mm")
    elif device.type != "cpu" or not triton.knobs.runtime.interpret:
        return Unsupported(f"the triton engine needs a CUDA GPU, the device is {device.type}; use torch_mm")
    if config is None:
        return None
    if config.dtype not in (torch.bfloat16, torch.float16):
        return Unsupported(
            f"the triton engine takes bfloat16 and float16, which tensor cores multiply exactly, not "
            f"{dtype_name(config.dtype)}; use torch_mm or the loop"
        )
    return grouped_mm.unaligned(config, "the triton engine")


def _products(permutation: Permutation) -> Products:
    return grouped_mm.products(permutation.offsets_L)  # Triton's do more than multiply


ENGINE = Engine(
    compute, unsupported, saves=True, adapts=True, accumulates=True, products=_products, own_products=products
)
