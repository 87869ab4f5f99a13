"""Compute the local experts with DeepGEMM's matrix products in FP8.

This is the engine `deep_gemm_fp8`. Its operands have the format of the engine `triton_fp8`, and the kernels of
`experts.fp8` quantise them: E4M3 with a float32 scale a block. DeepGEMM computes the products of the forward pass and
the gradients of rows. Kernels of this package compute the gradients of the weights, in FP8 as well, because DeepGEMM's
products for them need the number of rows of each expert on the host.

DeepGEMM takes groups of a multiple of 128 rows. So the engine appends tokens of zeros, whose choices fill the group of
each expert that has rows. Their outputs are dropped. The host does not wait for the device. The first call with other
sizes waits until nvcc has compiled a kernel.

DeepGEMM also counts blocks of 128 columns over the whole of gate and up. If these are halves that end with a partial
block, gate and up are products of their own in the forward pass. In the product for the gradients of the tokens, which
sums over both, zeros fill up each half of both operands to whole blocks.
"""

import torch
from torch import Tensor

from experts import catalog
from experts.compute import Engine, ExpertParameters, grouped_mm
from experts.compute.whole import Plan, needs_gradients
from experts.config import MoEConfig, Save, dtype_name
from experts.errors import Unsupported
from experts.fp8.blocks import BLOCK, Matrices, Rows, num_blocks
from experts.fp8.cache import WeightCache, Weights
from experts.permutation import Permutation, sort_by_expert

#: DeepGEMM has kernels for later GPUs, too, but their scales are powers of two.
NEEDED_MAJOR = 9
#: Rows of a group are a multiple of this number.
ROW_MULTIPLE = 128
#: The tensor memory accelerator needs rows of 16 bytes.
WIDTH_MULTIPLE = 16


def compute(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    config: MoEConfig,
    first: int,
    save: Save = "memory",
    cache: WeightCache | None = None,
) -> Tensor:
    """Return the local experts' sum [T, D]; see `Compute`.

    `cache` keeps the weights in FP8, with `save` "time" in the layouts of both passes. Without it, each product
    quantises its weights.
    """
    from experts.fp8.weights import FreshWeights
    from experts.fp8.whole import Fp8Plan, fp8_experts

    num_tokens, count = x_TD.shape[0], parameters.down_projs.shape[0]
    added_AK = fillers(indices_TK, first, count)
    x_TD = torch.cat([x_TD, x_TD.new_zeros(len(added_AK), x_TD.shape[1])])
    weights_TK = torch.cat([weights_TK, torch.zeros_like(added_AK, dtype=weights_TK.dtype)])
    permutation = sort_by_expert(torch.cat([indices_TK.long(), added_AK]), first, count)

    parameters = parameters.to(x_TD.dtype)
    given = parameters.gate_and_up_projs.detach(), parameters.down_projs.detach(), config
    back = needs_gradients(x_TD, weights_TK, parameters)
    weights: Weights = FreshWeights(*given, padded=True)
    if cache is not None:
        weights = cache.weights(*given, back=back, both=save == "time", padded=True)
    plan = Plan(permutation, config, grouped_mm.products(permutation.offsets_L), "memory")
    fp8_plan = Fp8Plan(plan, weights, product=Product(permutation))
    return fp8_experts(x_TD, weights_TK, parameters, fp8_plan)[:num_tokens]


def fillers(indices_TK: Tensor, first: int, count: int) -> Tensor:
    """Return the choices [A, K] of tokens that fill the rows of each local expert up to a multiple of 128.

    indices_TK: [T, K] of any integer dtype. The choices that are not needed are −1. An expert without rows gets none.
    The number of tokens A follows from the shapes, so the host does not wait, and (T + A)·K is a multiple of 128.
    """
    num_tokens, k = indices_TK.shape
    rows_L = sort_by_expert(indices_TK, first, count).tokens_per_expert_L
    ends_L = (-rows_L % ROW_MULTIPLE).cumsum(0)
    most = -(-count * (ROW_MULTIPLE - 1) // k)
    added = most + -(num_tokens + most) % ROW_MULTIPLE
    expert_A = torch.searchsorted(ends_L, torch.arange(added * k, device=indices_TK.device), right=True)
    return torch.where(expert_A < count, expert_A + first, -1).view(added, k)


class Product:
    """DeepGEMM's product of rows in FP8 that are grouped by expert, in groups of a multiple of 128 rows.

    The library counts blocks over a whole dimension. So if halves of Q end with a partial block, each half is a matrix
    of its own, with a call of its own. Halves of P must be filled up.
    """

    def __init__(self, permutation: Permutation) -> None:
        experts, row_to_expert_N = permutation.offsets_L.shape[0], permutation.row_to_expert_N
        self._row_to_expert_N = torch.where(row_to_expert_N < experts, row_to_expert_N, -1).int()

    def __call__(self, rows: Rows, matrices: Matrices, dtype: torch.dtype) -> Tensor:
        """Return [N, Q] in `dtype`: each row times the transpose of its expert's matrix [Q, P].

        Rows past the last group stay unwritten. The library takes bfloat16 only.
        """
        from deep_gemm import m_grouped_fp8_gemm_nt_contiguous

        experts, q, p = matrices.values.shape
        out_NQ = rows.values.new_empty(rows.values.shape[0], q, dtype=dtype)
        parts = matrices.q_halves if q // matrices.q_halves % BLOCK else 1
        values = matrices.values.view(parts * experts, q // parts, p)
        scales = matrices.scales.view(parts * experts, num_blocks(q // parts), -1)
        for part, columns in enumerate(out_NQ.chunk(parts, dim=1)):
            matrix_N = self._row_to_expert_N if parts == 1 else parts * self._row_to_expert_N + part
            m_grouped_fp8_gemm_nt_contiguous((rows.values, rows.scales.t()), (values, scales), columns, matrix_N)
        return out_NQ


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return why the engine cannot run the config, or None where it can.

    The engine needs DeepGEMM, Triton and a GPU of SM90. It takes bfloat16. `dim` and `moe_inter_dim` must be multiples
    of 16.
    """
    try:
        import deep_gemm  # noqa: F401
        import triton  # noqa: F401
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # the last two: another torch, no nvcc
        return Unsupported(catalog.missing("deep_gemm", error))
    if device.type != "cuda":
        return Unsupported(f"DeepGEMM needs a CUDA GPU of SM90, the device is {device.type}; use torch_mm")
    present = torch.cuda.get_device_capability(device)
    if present[0] != NEEDED_MAJOR:
        return Unsupported(
            f"DeepGEMM with float32 scales needs SM90, this is SM{present[0]}{present[1]}; use triton_fp8"
        )
    return None if config is None else _unfit(config)


def _unfit(config: MoEConfig) -> Unsupported | None:
    if config.dtype is not torch.bfloat16:
        return Unsupported(f"DeepGEMM returns bfloat16, not {dtype_name(config.dtype)}; use triton_fp8 or torch_mm")
    for name in ("dim", "moe_inter_dim"):
        size = getattr(config, name)
        if size % WIDTH_MULTIPLE:
            return Unsupported(f"DeepGEMM takes multiples of {WIDTH_MULTIPLE}, but {name} = {size}; use torch_mm")
    return None


ENGINE = Engine(compute, unsupported, saves=True, fp8=True)
