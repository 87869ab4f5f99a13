"""Know the backends with low-rank adapters (LoRA): the sizes of their adapters, adapters to try, and operations.

The weights of such a layer are frozen. A projection multiplies by weight + scale · A @ B. The scale is alpha / rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.parity.oracle import ADAPTERS
from moebench.workload.case import Case, width
from moebench.workload.driven import Backend

#: The standard deviation that the adapters of a measured job add, relative to that of the projection beside them.
ADDED_STD = 0.5


@dataclass(frozen=True)
class Lora:
    """The rank and alpha of a backend's adapters."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """The factor of A @ B."""
        return self.alpha / self.rank


def lora_of(backend: Backend) -> Lora | None:
    """Return the rank and alpha of a backend's adapters; None if it has no adapters."""
    told = getattr(backend, "lora", None)  # backends of older revisions do not have the attribute
    return None if told is None else Lora(told.rank, told.alpha)


def adapter_shapes(shapes: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapters beside projections of these shapes, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for projection, (name_A, name_B) in ADAPTERS.items():
        experts, rows, columns = shapes[projection]
        found |= {name_A: (experts, rows, rank), name_B: (experts, rank, columns)}
    return found


def make_adapters(case: Case, lora: Lora, weights: Mapping[str, Tensor], rank: int = 0) -> dict[str, Tensor]:
    """Return the adapters of a rank's experts by name, beside these stacked weights and in their dtype.

    B is not zero, as it is in a new adapter: else no error of an adapter would show in the output.
    """
    some = next(iter(weights.values()))
    generator = torch.Generator(some.device).manual_seed((case.seed + 0x9E3779B1 * rank + 2) % 2**32)
    shapes = adapter_shapes({name: tuple(stacked.shape) for name, stacked in weights.items()}, lora.rank)
    deviations = {name: 1 / math.sqrt(shape[1]) for name, shape in shapes.items()}
    for projection, (_, name_B) in ADAPTERS.items():
        gain = case.gain if projection == "gate_and_up_projs" else 1.0
        deviations[name_B] *= ADDED_STD * gain / abs(lora.scale)
    return {
        name: torch.empty(shape, dtype=some.dtype, device=some.device).normal_(
            std=deviations[name], generator=generator
        )
        for name, shape in shapes.items()
    }


def flops(case: Case, lora: Lora | None) -> float:
    """Return the useful floating-point operations of one rank; see `Case.flops`.

    With adapters, forward has 2·T·K·rank·(2·dim + width + inter) operations more, where width is that of the first
    projection. Mode "train" has twice the operations of the projections, because their gradients are not computed, and
    three times those of the adapters.
    """
    if lora is None:
        return case.flops()
    is_train = case.mode == "train"
    sizes = 2 * case.dim + width(case) + case.moe_inter_dim
    thin = 2 * case.num_active_tokens * case.n_activated_experts * lora.rank * sizes
    return case.flops() * (2 / 3 if is_train else 1) + thin * (3 if is_train else 1)
