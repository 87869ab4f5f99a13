"""Provide FP8 backends for a CPU, which quantise the operands of their matrix products.

Some backends are right, and the others have one fault each. With this folder on PYTHONPATH, a test names a backend as a
user would, for example `fp8:Current`. `faulty` makes a backend from a fault and a recipe.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from experts import BackendConfig, GroupedExperts, MoEConfig
from experts.activations import get_expert_activation_for_deepep
from experts.compute import ExpertParameters
from moebench.parity.quantization import fp8_product


class Fp8Experts(GroupedExperts):
    """Computes the local experts one after the other, with matrix products in FP8 and sums in float32.

    `pick` orders the local experts that have tokens: "busiest" puts the expert with the most tokens first, any other
    value the expert with the fewest tokens. A fault is in the first expert, or in the first two experts.
    """

    fp8: ClassVar[str]
    pick: ClassVar[str] = "busiest"

    def __init__(self, config: MoEConfig, dispatcher: str | None = None) -> None:
        super().__init__(config, BackendConfig(experts="loop", dispatcher=dispatcher))  # type: ignore[arg-type]
        self.picked: list[int] = []

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        """See `ExpertLayer.compute_local`. Sets `picked` to the local experts with tokens, in the order of `pick`."""
        experts = range(self.n_local_experts)
        chosen = [torch.where(indices_RK == self.first_local_expert + local) for local in experts]
        in_order = sorted((len(rows_N), local) for local, (rows_N, _) in enumerate(chosen) if len(rows_N))
        self.picked = [local for _, local in (reversed(in_order) if self.pick == "busiest" else in_order)]
        out_RD = torch.zeros_like(x_RD, dtype=torch.float32)
        for local, (rows_N, choices_N) in enumerate(chosen):
            y_ND = self.expert(local, x_RD[rows_N], weights_RK[rows_N, choices_N].unsqueeze(-1))
            out_RD = out_RD.index_add(0, rows_N, y_ND)
        return out_RD.to(x_RD.dtype)

    def expert(self, local: int, x_ND: Tensor, weights_N1: Tensor) -> Tensor:
        """Return one expert's output for its rows, [N, D] in float32, with the routing weights applied."""
        gate_up, down, gate_up_bias, down_bias = self.parameters_of(local)
        h_NI = self.multiply(x_ND, gate_up, local, "up")
        h_NI = h_NI if gate_up_bias is None else h_NI + gate_up_bias
        after_down = self.config.apply_router_weight_after_down
        inside_N1 = torch.ones_like(weights_N1) if after_down else weights_N1
        a_NI = get_expert_activation_for_deepep(self.config)(h_NI, inside_N1)
        y_ND = self.multiply(a_NI, down, local, "down").float()
        if down_bias is not None:
            y_ND = y_ND + self.weighted(down_bias.float(), inside_N1)
        return y_ND * weights_N1 if after_down else y_ND

    def parameters_of(self, local: int) -> ExpertParameters:
        """Return the parameters of one expert."""
        return ExpertParameters(*(None if p is None else p[local] for p in self.expert_parameters()))  # type: ignore[arg-type]

    def multiply(self, a: Tensor, b: Tensor, local: int, projection: str) -> Tensor:
        """Return a @ b in FP8. `projection`, which is "up" or "down", is the projection of the expert `local`."""
        return fp8_product(self.fp8)(a, b)

    def weighted(self, down_bias: Tensor, weights_N1: Tensor) -> Tensor:
        """Return the down projection's bias times the routing weight of each row."""
        return down_bias * weights_N1


class Current(Fp8Experts):
    """A right backend with current scaling."""

    fp8 = "current"


class Block(Fp8Experts):
    """A right backend with block scaling."""

    fp8 = "block"


class Delayed(Fp8Experts):
    """A right backend with scales that fit larger tensors of earlier calls, as the recipe allows."""

    fp8 = "delayed"

    def multiply(self, a: Tensor, b: Tensor, local: int, projection: str) -> Tensor:
        """Multiply with scales that leave a part of the FP8 format's range unused."""
        product: Tensor = _WithHeadroom.apply(a, b)
        return product


class _WithHeadroom(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return (_rounded(a, torch.float8_e4m3fn) @ _rounded(b, torch.float8_e4m3fn)).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (_rounded(saved, torch.float8_e4m3fn) for saved in ctx.saved_tensors)
        rounded = _rounded(grad, torch.float8_e5m2)
        return (rounded @ b.t()).to(grad.dtype), (a.t() @ rounded).to(grad.dtype)


def _rounded(values: Tensor, fmt: torch.dtype) -> Tensor:
    largest = float(values.abs().max()) if values.numel() else 0.0
    scale = torch.finfo(fmt).max / (1.37 * largest or 1.0)
    return (values.float() * scale).to(fmt).float() / scale


# faults


class WrongScale(Fp8Experts):
    """One expert's matrix product is wrong by a factor, as with another expert's scale. The gradients are right."""

    factor: ClassVar[float]
    projection: ClassVar[str] = "down"

    def multiply(self, a: Tensor, b: Tensor, local: int, projection: str) -> Tensor:
        """Multiply, and scale the product of the faulty expert and projection."""
        right = super().multiply(a, b, local, projection)
        return self.scaled(right) if (local, projection) == (self.picked[0], self.projection) else right

    def scaled(self, right: Tensor) -> Tensor:
        """Scale the product in the forward pass only."""
        return right + (right * (self.factor - 1)).detach()


class WrongScaleBackward(WrongScale):
    """The gradient of one expert's matrix product is wrong by a factor. The forward pass is right."""

    def scaled(self, right: Tensor) -> Tensor:
        """Scale the gradient in the backward pass only."""
        if right.requires_grad:
            right.register_hook(lambda grad: grad * self.factor)
        return right


class TransposedWeight(Fp8Experts):
    """One expert's down projection is transposed. The shapes fit only if `dim` equals `moe_inter_dim`."""

    def multiply(self, a: Tensor, b: Tensor, local: int, projection: str) -> Tensor:
        """Multiply, with b transposed for the down projection of the faulty expert."""
        wrong = (local, projection) == (self.picked[0], "down")
        return super().multiply(a, b.t() if wrong else b, local, projection)


class UnweightedDownBias(Fp8Experts):
    """The down projection's bias is added without the routing weight, as Transformer Engine adds biases."""

    def weighted(self, down_bias: Tensor, weights_N1: Tensor) -> Tensor:
        """Return the bias without the routing weight."""
        return down_bias.expand(len(weights_N1), -1)


class DroppedToken(Fp8Experts):
    """One token is dropped."""

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        """Compute without the first token that has an expert."""
        first = (indices_RK >= 0).any(dim=1).nonzero()[0]
        dropped_R1 = torch.arange(len(x_RD)).unsqueeze(-1) == first
        return super().compute_local(x_RD, weights_RK, indices_RK.masked_fill(dropped_R1, -1))


class SwappedExperts(Fp8Experts):
    """Two experts are exchanged."""

    def parameters_of(self, local: int) -> ExpertParameters:
        """Return the parameters of one expert. For each of the two swapped experts, return the other's parameters."""
        one, other = self.picked[:2]
        return super().parameters_of({one: other, other: one}.get(local, local))


class SilentExpert(Fp8Experts):
    """One expert adds zeros. The expert's gradients are zeros and are not missing."""

    def expert(self, local: int, x_ND: Tensor, weights_N1: Tensor) -> Tensor:
        """Return zeros for the faulty expert."""
        right = super().expert(local, x_ND, weights_N1)
        return right * 0 if local == self.picked[0] else right


class DetachedRoutingWeight(Fp8Experts):
    """The gradient of the routing weights is zero. The forward pass is right."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Compute the right output, with detached routing weights."""
        return super().forward(x, token_mask, weights.detach() + 0 * weights, indices)


FAULTS: dict[str, tuple[type[Fp8Experts], dict[str, Any]]] = {
    **{f"{projection} × {factor:g}": (WrongScale, {"factor": factor, "projection": projection})
       for projection in ("up", "down") for factor in (0.5, 1.5, 2.0)},
    **{f"gradient of {projection} × {factor:g}": (WrongScaleBackward, {"factor": factor, "projection": projection})
       for projection in ("up", "down") for factor in (0.5, 1.5, 2.0)},
    "transposed weight": (TransposedWeight, {}),
    "unweighted down bias": (UnweightedDownBias, {}),
    "dropped token": (DroppedToken, {}),
    "swapped experts": (SwappedExperts, {}),
    "silent expert": (SilentExpert, {}),
    "detached routing weight": (DetachedRoutingWeight, {}),
}  # fmt: skip
FORWARD_IS_RIGHT = {name for name in FAULTS if name.startswith(("gradient", "detached"))}


def faulty(fault: type[Fp8Experts], recipe: str, **fields: Any) -> type[Fp8Experts]:
    """Return a backend with a fault, for a recipe. `fields` are further attributes of the backend's class."""
    return type(fault.__name__, (fault,), {"fp8": recipe, **fields})


CurrentWithWrongScale = faulty(WrongScale, "current", factor=1.5)
