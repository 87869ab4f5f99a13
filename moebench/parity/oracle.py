"""The oracle: what an expert layer must return, written down from the formulas in docs/concepts.md.

The code imports nothing from `experts`, so that a fault in `experts` cannot change what is right. It works in any float
dtype. In float64 it is the reference. In the dtype of a case it shows what rounding costs.

G is a number of experts that are computed together, M the number of rows of each, H the width of the first projection.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.workload.case import Case

#: The names of the parameters, in the order in which documents list them.
PARAMETER_NAMES = ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias")

#: Projection -> the names of its adapters A and B. Beside a projection [E, rows, columns], their shapes are
#: [E, rows, rank] and [E, rank, columns].
ADAPTERS = {
    "gate_and_up_projs": ("lora_gate_and_up_A", "lora_gate_and_up_B"),
    "down_projs": ("lora_down_A", "lora_down_B"),
}
ADAPTER_NAMES = tuple(name for pair in ADAPTERS.values() for name in pair)

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Formula:
    """The choices of a case that change the formula. A limit of 0 means that nothing is clamped.

    `lora_scale` is the factor of A @ B in a layer with adapters, and 0 in other layers. With `adds_rows`, the adapters'
    rows are added to the projection's rows; else their matrices are added. In exact numbers both are the same.
    """

    activation: str
    alpha: float
    limit: float
    weight_after_down: bool
    lora_scale: float = 0.0
    adds_rows: bool = False

    @classmethod
    def of(cls, case: Case, lora_scale: float = 0.0) -> "Formula":
        """Return the formula of a case's layer."""
        limits = {"swiglu": case.swiglu_limit, "swigluoai": case.activation_limit, "quick_geglu": case.activation_limit}
        limit = limits.get(case.expert_activation, 0.0)
        after_down = case.apply_router_weight_after_down
        return cls(case.expert_activation, case.activation_alpha, limit, after_down, lora_scale)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of activations and sums: float32, or float64 for float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def arguments(formula: Formula, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of the activation of h [..., H], [..., I] each: gate and up after the clamps.

    Where the formula has up + 1, the second factor is that. Without a gate, both are relu(h).
    """
    if formula.activation == "relu2":
        positive = torch.where(h > 0, h, 0 * h)
        return positive, positive
    if formula.activation == "quick_geglu":
        gate, up = h[..., 0::2], h[..., 1::2]
    else:
        inter = h.shape[-1] // 2
        gate, up = h[..., :inter], h[..., inter:]
    if formula.limit > 0:
        gate, up = gate.clamp(max=formula.limit), up.clamp(min=-formula.limit, max=formula.limit)
    return gate, up + 1 if formula.activation in ("swigluoai", "quick_geglu") else up


def activation(formula: Formula, h: Tensor) -> Tensor:
    """Return the activation of h [..., H] without the routing weight, in h's dtype: [..., I]."""
    gate, up = arguments(formula, h)
    if formula.activation == "relu2":
        return gate * up
    if formula.activation == "swiglu":
        return gate * torch.sigmoid(gate) * up
    if formula.activation == "geglu":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up
    assert formula.activation in ("swigluoai", "quick_geglu"), formula.activation
    return gate * torch.sigmoid(formula.alpha * gate) * up


def trained(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the parameters that get gradients: the adapters if there are any, else all."""
    found = tuple(names)
    return tuple(name for name in found if name in ADAPTER_NAMES) or found


def effective(experts: Mapping[str, Tensor], projection: str, scale: float) -> Tensor:
    """Return the matrices [G, rows, columns] that experts multiply by: the projection, with its adapters if any."""
    name_A, name_B = ADAPTERS[projection]
    weights = experts[projection]
    return weights + scale * (experts[name_A] @ experts[name_B]) if name_A in experts else weights


@dataclass(frozen=True)
class Values:
    """What G experts compute for their rows, in the order of the formulas. Each tensor has G and M first."""

    h: Tensor  # [G, M, H], the first projection, in x's dtype
    a: Tensor  # [G, M, I], the activation without the routing weight, in the wide dtype of x
    y: Tensor  # [G, M, D], what the experts add to their rows, in the wide dtype of x


def experts_values(
    formula: Formula,
    x_GMD: Tensor,
    weights_GM: Tensor,
    experts: Mapping[str, Tensor],
    product: Product = torch.matmul,
) -> Values:
    """Return what G experts compute for their rows x [G, M, D] with the routing weights [G, M].

    `experts` has each parameter of these experts by name, stacked on G, in x's dtype. Adapters count as parameters.
    Matrix products run in x's dtype, activations and sums in the wide dtype of x. `product` multiplies two stacks of
    matrices.
    """
    dtype = x_GMD.dtype
    inner = wide(dtype)
    weights_GM1 = weights_GM.to(inner).unsqueeze(-1)
    h_GMH = _project(formula, x_GMD, experts, "gate_and_up_projs", product)
    if "gate_up_proj_bias" in experts:
        h_GMH = h_GMH + experts["gate_up_proj_bias"].unsqueeze(1)
    a_GMI = activation(formula, h_GMH.to(inner))
    weighted_GMI = a_GMI if formula.weight_after_down else a_GMI * weights_GM1
    y_GMD = _project(formula, weighted_GMI.to(dtype), experts, "down_projs", product).to(inner)
    if "down_proj_bias" in experts:
        bias_G1D = experts["down_proj_bias"].to(inner).unsqueeze(1)
        y_GMD = y_GMD + (bias_G1D if formula.weight_after_down else bias_G1D * weights_GM1)
    return Values(h_GMH, a_GMI, y_GMD * weights_GM1 if formula.weight_after_down else y_GMD)


def _project(
    formula: Formula, rows: Tensor, experts: Mapping[str, Tensor], projection: str, product: Product
) -> Tensor:
    """Return the projection of the rows [G, M, …], with the adapters beside it if it has any."""
    if not formula.adds_rows:
        return product(rows, effective(experts, projection, formula.lora_scale))
    a, b = (experts[name] for name in ADAPTERS[projection])
    return product(rows, experts[projection]) + product(formula.lora_scale * product(rows, a), b)


def gradients(
    formula: Formula,
    x_GMD: Tensor,
    weights_GM: Tensor,
    experts: Mapping[str, Tensor],
    grad_GMD: Tensor,
    product: Product = torch.matmul,
) -> tuple[Values, dict[str, Tensor]]:
    """Return the values of `experts_values`, and the gradients of `x`, `weights`, `h` and each trained parameter.

    Autograd differentiates the formulas, from the output's gradient [G, M, D].
    """
    leaves = {"x": x_GMD, "weights": weights_GM, **{name: experts[name] for name in trained(experts)}}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    inner = {name: leaves.get(name, stacked) for name, stacked in experts.items()}
    values = experts_values(formula, leaves["x"], leaves["weights"], inner, product)
    of = {**leaves, "h": values.h}
    grads = torch.autograd.grad(values.y, list(of.values()), grad_GMD.to(values.y.dtype))
    detached = Values(values.h.detach(), values.a.detach(), values.y.detach())
    return detached, dict(zip(of, grads, strict=True))
