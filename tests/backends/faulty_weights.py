"""Provide backends with a fault in activations, parameters, their gradients or the state dict; see faulty."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from experts import GroupedExperts, is_gated_activation
from experts.compute import ExpertParameters

LOWER = {torch.float64: torch.float32, torch.float32: torch.bfloat16}


def _as_named(count: int) -> list[int]:
    """Return the numbers of the experts in the order of their names: 0, 1, 10, 11, 2, …"""
    return sorted(range(count), key=str)


# activations


class _OtherConfig(GroupedExperts):
    """The layer computes with another configuration than the caller gave it."""

    def __init__(self, config: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self.config = dataclasses.replace(config, **self.other(config))

    def other(self, config: Any) -> dict[str, Any]:
        """Return the fields that differ, with their values."""
        raise NotImplementedError


class FixedAlpha(_OtherConfig):
    """The slope inside the sigmoid is always 1.702, whatever the configuration says."""

    def other(self, config: Any) -> dict[str, Any]:
        return {"activation_alpha": 1.702}


class NoLimit(_OtherConfig):
    """Nothing is clamped."""

    def other(self, config: Any) -> dict[str, Any]:
        return {"activation_limit": 1e4, "swiglu_limit": 0.0}


class SiluForGelu(GroupedExperts):
    """The gate of geglu goes through SiLU, which is similar to GELU."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        right = self.config
        is_geglu = right.expert_activation == "geglu"
        self.config = dataclasses.replace(right, expert_activation="swiglu") if is_geglu else right
        try:
            return super().forward(x, token_mask, weights, indices)
        finally:
            self.config = right


class HalvesForInterleaved(GroupedExperts):
    """Interleaved gate and up columns are read as halves, and halves are read as interleaved columns."""

    def expert_parameters(self) -> ExpertParameters:
        right = super().expert_parameters()
        if not is_gated_activation(self.config.expert_activation):
            return right
        width = right.gate_and_up_projs.shape[-1]
        order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
        if self.config.expert_activation == "quick_geglu":
            order = order.argsort()
        bias = right.gate_up_proj_bias
        return right._replace(
            gate_and_up_projs=right.gate_and_up_projs[..., order],
            gate_up_proj_bias=None if bias is None else bias[..., order],
        )


class GateAndUpExchanged(GroupedExperts):
    """The gate and up columns of the first projection are exchanged."""

    def expert_parameters(self) -> ExpertParameters:
        right = super().expert_parameters()
        if not is_gated_activation(self.config.expert_activation):
            return right
        shift = 1 if self.config.expert_activation == "quick_geglu" else right.gate_and_up_projs.shape[-1] // 2
        bias = right.gate_up_proj_bias
        return right._replace(
            gate_and_up_projs=_exchanged(right.gate_and_up_projs, shift),
            gate_up_proj_bias=None if bias is None else _exchanged(bias, shift),
        )


def _exchanged(columns: Tensor, shift: int) -> Tensor:
    """Return the columns with neighbouring blocks of `shift` columns exchanged."""
    return columns.unflatten(-1, (-1, 2, shift)).flip(-2).flatten(-3)


# parameters


class LowPrecisionWeights(GroupedExperts):
    """The down projection is rounded to the next lower precision, for example from float32 to bfloat16."""

    def expert_parameters(self) -> ExpertParameters:
        right = super().expert_parameters()
        dtype = right.down_projs.dtype
        return right._replace(down_projs=right.down_projs.to(LOWER.get(dtype, dtype)).to(dtype))


class TransposedWhereSquare(GroupedExperts):
    """A projection is transposed if its two dimensions are equal. Other projections are right."""

    def expert_parameters(self) -> ExpertParameters:
        right = super().expert_parameters()
        turned = {
            name: getattr(right, name).transpose(1, 2)
            for name in ("gate_and_up_projs", "down_projs")
            if getattr(right, name).shape[1] == getattr(right, name).shape[2]
        }
        return right._replace(**turned)


class ExpertsInOrderOfNames(GroupedExperts):
    """Experts are loaded in the order of their names. With more than ten experts, this order is not the right one."""

    def expert_parameters(self) -> ExpertParameters:
        right = super().expert_parameters()
        order = _as_named(self.n_routed_experts)
        return ExpertParameters(*(None if p is None else p[order] for p in right))


class BiasOfNeighbour(GroupedExperts):
    """Each expert adds the first projection's bias of the expert before it."""

    def expert_parameters(self) -> ExpertParameters:
        right = super().expert_parameters()
        bias = right.gate_up_proj_bias
        return right if bias is None else right._replace(gate_up_proj_bias=bias.roll(1, 0))


class CastCopy(GroupedExperts):
    """Weights are cast once, in the first call, and later changes of the parameters do not reach the copy."""

    def expert_parameters(self) -> ExpertParameters:
        right = super().expert_parameters()
        if not hasattr(self, "_copy"):
            self._copy = [None if p is None else p.detach().clone() for p in right]
        pairs = zip(right, self._copy, strict=True)
        return ExpertParameters(*(None if p is None or copy is None else copy + (p - p.detach()) for p, copy in pairs))


class StateDictInOrderOfNames(GroupedExperts):
    """The state dict holds the experts in the order of their names."""

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        right = super().state_dict(*arguments, **named)
        order = _as_named(self.n_routed_experts)
        return {name: tensor[order] for name, tensor in right.items()}


class StateDictWithoutBiases(GroupedExperts):
    """The state dict holds zeros instead of the biases, and loading it raises no error."""

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        right = super().state_dict(*arguments, **named)
        return {name: torch.zeros_like(value) if "bias" in name else value for name, value in right.items()}


class LoadsOnce(GroupedExperts):
    """Weights that are loaded a second time are ignored."""

    def load_state_dict(self, *arguments: Any, **named: Any) -> Any:
        if not getattr(self, "_has_loaded", False):
            self._has_loaded = True
            return super().load_state_dict(*arguments, **named)
        return None


# gradients


class _OtherGrads(GroupedExperts):
    """The layer reports the gradients that `change` returns."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        active = indices[token_mask].flatten().long()
        self._rows_E = (active + 1).bincount(minlength=self.n_routed_experts + 1)[1:]
        return super().forward(x, token_mask, weights, indices)

    def stacked_grads(self) -> dict[str, Tensor]:
        return self.change(super().stacked_grads())

    def change(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients that the layer reports."""
        raise NotImplementedError


class NoGradOfEmptyExperts(_OtherGrads):
    """If an expert has no tokens, its weight gradient is None, and so the stacked gradient is missing."""

    def change(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: g for n, g in grads.items() if "bias" in n or (self._rows_E > 0).all()}


class NoBiasGradOfEmptyExperts(_OtherGrads):
    """If an expert has no tokens, its bias gradient is None, and so the stacked gradient is missing."""

    def change(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: g for n, g in grads.items() if "bias" not in n or (self._rows_E > 0).all()}


class AddedUpGrad(_OtherGrads):
    """The busiest expert's weight gradient is added to the gradient of the last pass, which is still in the buffer."""

    def change(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        right, expert = grads["down_projs"], int(self._rows_E.argmax())
        wrong, before = right.clone(), getattr(self, "_before", None)
        if before is not None and before.shape == right.shape:
            wrong[expert] += before[expert]
        self._before = wrong
        return {**grads, "down_projs": wrong}


class GradInAnotherDtype(_OtherGrads):
    """A gradient does not have its parameter's dtype: float32 for 16 bits, and a shorter dtype for longer dtypes."""

    def change(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: g.to(LOWER.get(g.dtype, torch.float32)) for n, g in grads.items()}


class ScaledGradOfOneExpert(_OtherGrads):
    """One expert's weight gradient is 2% too large."""

    factor = 1.02

    def change(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        factor_E = torch.where(torch.arange(len(self._rows_E)) == self._rows_E.argmax(), self.factor, 1.0)
        return {n: (g * factor_E.view(-1, *[1] * (g.ndim - 1))).to(g.dtype) for n, g in grads.items()}


class HalfOfABiasGrad(_OtherGrads):
    """The down projection's bias gradient is halved, as if a kernel summed only every second row of a tile."""

    def change(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: g * 0.5 if n == "down_proj_bias" else g for n, g in grads.items()}
