"""Compute the weighted activations: the function between the two projections, multiplied by the routing weight.

Every activation takes x [N, 2I] ([N, I] for `relu2`) and the routing weights [N] or [N, 1] in permuted order. It
computes in float32 (float64 for float64) and returns [N, I] in x's dtype. N stands for any number of dimensions, also
for none. Gradients flow to x and to the routing weights. Raises InputError for routing weights of another shape, and
for an odd number of columns where half of them are the gate.

Each formula and its column layout come from a model that uses the activation. docs/concepts.md lists the activations
with their models.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from experts.adopt import moe_config
from experts.config import MoEConfig
from experts.errors import InputError

WeightedActivation = Callable[[Tensor, Tensor], Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums and activations of `dtype` are computed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _weighted(value: Tensor, permuted_probs: Tensor, dtype: torch.dtype) -> Tensor:
    probs = permuted_probs.unsqueeze(-1) if permuted_probs.ndim < value.ndim else permuted_probs
    rows = list(value.shape[:-1])
    if probs.shape != (*rows, 1):
        raise InputError(
            f"permuted_probs has shape {list(permuted_probs.shape)}, but must be {rows} or {[*rows, 1]}: one routing "
            "weight for each row of x; reshape it"
        )
    return (value * probs.to(value.dtype)).to(dtype)


def _upcast(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_even(x)
    gate, up = _upcast(x).chunk(2, dim=-1)
    return gate, up


def _alternating(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_even(x)
    x_acc = _upcast(x)
    return x_acc[..., ::2], x_acc[..., 1::2]


def _check_even(x: Tensor) -> None:
    if x.shape[-1] % 2:
        raise InputError(
            f"x has {x.shape[-1]} columns, but needs an even number: one half is the gate, the other half is up; use "
            "relu2 for an activation without a gate"
        )


def swiglu_deepep(x: Tensor, permuted_probs: Tensor, limit: float = 0.0) -> Tensor:
    """Return silu(gate)·up, where x holds the halves [gate | up].

    With limit > 0, clamp gate to at most `limit` and up to ±`limit`, before silu.
    """
    gate, up = _halves(x)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return _weighted(F.silu(gate) * up, permuted_probs, x.dtype)


def swigluoai_deepep(x: Tensor, permuted_probs: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """Return gate·sigmoid(alpha·gate)·(up + 1), where x holds the halves [gate | up].

    Gate is first clamped to at most `limit` and up to ±`limit`.
    """
    gate, up = _halves(x)
    return _weighted(_clamped_sigmoid_glu(gate, up, alpha, limit, 1.0), permuted_probs, x.dtype)


def quick_geglu_deepep(
    x: Tensor, permuted_probs: Tensor, alpha: float = 1.702, limit: float = 7.0, linear_offset: float = 1.0
) -> Tensor:
    """Return gate·sigmoid(alpha·gate)·(up + linear_offset), where gate is x's even columns and up its odd columns.

    Gate is first clamped to at most `limit` and up to ±`limit`.
    """
    gate, up = _alternating(x)
    return _weighted(_clamped_sigmoid_glu(gate, up, alpha, limit, linear_offset), permuted_probs, x.dtype)


def geglu_deepep(x: Tensor, permuted_probs: Tensor) -> Tensor:
    """Return gelu_tanh(gate)·up, where x holds the halves [gate | up]."""
    gate, up = _halves(x)
    return _weighted(F.gelu(gate, approximate="tanh") * up, permuted_probs, x.dtype)


def relu2_deepep(x: Tensor, permuted_probs: Tensor) -> Tensor:
    """Return relu(x)². This activation has no gate."""
    return _weighted(F.relu(_upcast(x)).square(), permuted_probs, x.dtype)


def _clamped_sigmoid_glu(gate: Tensor, up: Tensor, alpha: float, limit: float, linear_offset: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + linear_offset)


@dataclass(frozen=True)
class ActivationForm:
    """The parameters of the formula that the kernels use for every activation.

    A gated activation is gate·sigmoid(p(gate))·(up + offset). An activation without a gate is relu(x)². Without `gelu`,
    p(gate) is alpha·gate. With `gelu`, p(gate) is 2·√(2/π)·(gate + 0.044715·gate³), so that gate·sigmoid(p(gate)) is
    gelu_tanh(gate). With `limit` > 0, gate is first clamped to at most `limit` and up to ±`limit`. A `limit` of 0 means
    no clamp. `interleaved` is true if x's columns alternate between gate and up.
    """

    gated: bool
    interleaved: bool = False
    gelu: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    offset: float = 0.0


#: silu(gate)·up without a limit, with gate and up in halves.
SWIGLU = ActivationForm(gated=True)


def activation_form(config: MoEConfig) -> ActivationForm:
    """Return the formula's parameters for the activation that `get_expert_activation_for_deepep(config)` returns."""
    match config.expert_activation:
        case "swiglu":
            return ActivationForm(gated=True, limit=config.swiglu_limit)
        case "swigluoai" | "quick_geglu" as name:
            interleaved = name == "quick_geglu"
            alpha, limit = config.activation_alpha, config.activation_limit
            return ActivationForm(gated=True, interleaved=interleaved, alpha=alpha, limit=limit, offset=1.0)
        case "geglu":
            return ActivationForm(gated=True, gelu=True)
        case "relu2":
            return ActivationForm(gated=False)


def get_expert_activation_for_deepep(config: MoEConfig) -> WeightedActivation:
    """Return the config's weighted activation, a function (x, permuted_probs) -> [N, I] with alpha and limits bound.

    The config may be of another class with the fields of MoEConfig (`experts.adopt`).
    """
    config = moe_config(config)
    match config.expert_activation:
        case "swiglu":
            return functools.partial(swiglu_deepep, limit=config.swiglu_limit)
        case "swigluoai":
            return functools.partial(swigluoai_deepep, alpha=config.activation_alpha, limit=config.activation_limit)
        case "quick_geglu":
            return functools.partial(quick_geglu_deepep, alpha=config.activation_alpha, limit=config.activation_limit)
        case "geglu":
            return geglu_deepep
        case "relu2":
            return relu2_deepep
