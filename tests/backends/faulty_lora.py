"""Provide layers with low-rank adapters that are right except for one fault each; see faulty.

`FAULTS` has the tensors in which a measured job must find each fault; one of them is named.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from experts import GroupedExperts, GroupedExpertsLoRA
from experts.compute import PARAMETER_NAMES, Adapters, ExpertParameters
from experts.lora.layer import ADAPTER_NAMES


class InertAdapters(GroupedExpertsLoRA):
    """The adapters add nothing. Their gradients are zeros."""

    def expert_adapters(self) -> Adapters:
        right = super().expert_adapters()
        return Adapters(0.0, *right.tensors)


class ForgottenAdapters(GroupedExpertsLoRA):
    """The adapters are not part of the computation, and have no gradients."""

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        return GroupedExperts.compute_local(self, x_RD, weights_RK, indices_RK)


class InertDownAdapter(GroupedExpertsLoRA):
    """The adapter of the down projection adds nothing, as if it was not injected there. Its gradients are zeros."""

    def expert_adapters(self) -> Adapters:
        right = super().expert_adapters()
        return right._replace(down_B=right.down_B * 0)


class TrainedWeights(GroupedExpertsLoRA):
    """The weights beside the adapters are not frozen."""

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.requires_grad_(True)

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return GroupedExperts.forward(self, x, token_mask, weights, indices)


class TrainedBias(TrainedWeights):
    """The biases beside the adapters are not frozen."""

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.gate_and_up_projs.requires_grad_(False)
        self.down_projs.requires_grad_(False)


class ScaleIsAlpha(GroupedExpertsLoRA):
    """A @ B counts alpha times, not alpha / rank times."""

    @property
    def scale(self) -> float:
        return self.alpha


class ScaleWithRootOfRank(GroupedExpertsLoRA):
    """A @ B counts alpha / √rank times, as with rank-stabilised LoRA, which nobody asked for."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank**0.5


class NoScale(GroupedExpertsLoRA):
    """A @ B counts once, whatever alpha is."""

    @property
    def scale(self) -> float:
        return 1.0


class ScaleInForwardAlone(GroupedExpertsLoRA):
    """The gradients of the adapters lack the scale. The forward pass is right."""

    def expert_adapters(self) -> Adapters:
        right = super().expert_adapters()
        return Adapters(right.scale, *(_DividedGrad.apply(tensor, right.scale) for tensor in right.tensors))


class _DividedGrad(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, divisor: float) -> Tensor:
        ctx.divisor = divisor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.divisor, None


class SwappedAdapters(GroupedExpertsLoRA):
    """The adapters of the first and the last expert are exchanged. The weights are not."""

    def expert_adapters(self) -> Adapters:
        right = super().expert_adapters()
        order = torch.arange(right.down_A.shape[0]).roll(0)
        order[[0, -1]] = order[[-1, 0]]
        return Adapters(right.scale, *(tensor[order] for tensor in right.tensors))


class AdaptersOfOneExpert(GroupedExpertsLoRA):
    """All experts use the adapter A of the first expert, as if A was shared between them."""

    def expert_adapters(self) -> Adapters:
        right = super().expert_adapters()
        return right._replace(gate_and_up_A=right.gate_and_up_A[:1].expand_as(right.gate_and_up_A))


class SwappedHalves(GroupedExpertsLoRA):
    """The adapter of the up projection adds the rows of gate to up, and those of up to gate."""

    def expert_adapters(self) -> Adapters:
        right = super().expert_adapters()
        columns = right.gate_and_up_B.shape[-1]
        return right._replace(gate_and_up_B=right.gate_and_up_B.roll(columns // 2, dims=-1))


class LastOfRankIsLeftOut(GroupedExpertsLoRA):
    """The last column of A and the last row of B are left out, as by a kernel that rounds the rank down."""

    def expert_adapters(self) -> Adapters:
        scale, up_A, up_B, down_A, down_B = super().expert_adapters()
        kept = torch.arange(self.rank) < self.rank - 1
        return Adapters(scale, up_A * kept, up_B * kept[:, None], down_A * kept, down_B * kept[:, None])


class FrozenA(GroupedExpertsLoRA):
    """A gets no gradient, so that only B is trained."""

    def expert_adapters(self) -> Adapters:
        right = super().expert_adapters()
        zero_up, zero_down = 0 * right.gate_and_up_A, 0 * right.down_A
        return right._replace(
            gate_and_up_A=right.gate_and_up_A.detach() + zero_up, down_A=right.down_A.detach() + zero_down
        )


class TokensWithoutAdapterGradient(GroupedExpertsLoRA):
    """The gradient of the tokens is that of the weights alone. Outputs and the adapters' gradients are right."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        right = super().forward(x.detach(), token_mask, weights, indices)
        if not x.requires_grad or not torch.is_grad_enabled():
            return right
        alone = GroupedExperts.compute_local(
            self, x, weights.detach(), indices.long().masked_fill(~token_mask[:, None], -1)
        )
        return _GradOfOther.apply(right, alone)


class _GradOfOther(Function):
    """Returns the first tensor, and gives both the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, other: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


class UnweightedDownAdapter(GroupedExpertsLoRA):
    """What the adapter of the down projection adds lacks the routing weight."""

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        parameters, adapters = self.expert_parameters(), self.expert_adapters()
        without = adapters._replace(down_B=adapters.down_B * 0)
        ones = torch.where(indices_RK >= 0, 1.0, weights_RK).to(weights_RK.dtype)

        def compute(weights: Tensor, own: Adapters) -> Tensor:
            first = self.first_local_expert
            return self.engine.compute(x_RD, weights, indices_RK, parameters, self.config, first, adapters=own)

        return compute(weights_RK, without) + compute(ones, adapters) - compute(ones, without)


class StaleSum(GroupedExpertsLoRA):
    """In evaluation, weight + scale · A @ B is computed once and kept: adapters that changed later are not seen."""

    kept: ExpertParameters | None = None

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().compute_local(x_RD, weights_RK, indices_RK)
        if self.kept is None:
            right, (scale, up_A, up_B, down_A, down_B) = self.expert_parameters(), self.expert_adapters()
            added = {"gate_and_up_projs": up_A @ up_B, "down_projs": down_A @ down_B}
            sums = {name: (getattr(right, name) + scale * delta).to(x_RD.dtype) for name, delta in added.items()}
            self.kept = right._replace(**sums)
        return self.engine.compute(x_RD, weights_RK, indices_RK, self.kept, self.config, self.first_local_expert)


class AdaptersAreNotSaved(GroupedExpertsLoRA):
    """The state dict has no adapters: a checkpoint loses what was trained."""

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.register_state_dict_post_hook(_without_adapters)


def _without_adapters(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.removeprefix(prefix).startswith("lora_")]:
        del state_dict[name]


class SavedMerged(GroupedExpertsLoRA):
    """The state dict has the sums in place of the weights, and the adapters beside them: a load adds them twice."""

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.register_state_dict_post_hook(_with_sums)


def _with_sums(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, own in (("gate_and_up_projs", "gate_and_up"), ("down_projs", "down")):
        A, B = (state_dict[f"{prefix}lora_{own}_{which}"] for which in "AB")
        state_dict[prefix + name] = (state_dict[prefix + name] + module.scale * (A @ B)).to(A.dtype)


GRADIENTS = {f"{name}.grad" for name in ADAPTER_NAMES}
#: Fault -> the tensors, one of which a measured job must name. A measured job does not find the other faults.
FAULTS: dict[type[GroupedExpertsLoRA], set[str]] = {
    InertAdapters: {"output", *GRADIENTS},
    ForgottenAdapters: GRADIENTS,
    InertDownAdapter: {"output", *GRADIENTS},
    TrainedWeights: {f"{name}.grad" for name in PARAMETER_NAMES},
    ScaleIsAlpha: {"output", "x.grad", "weights.grad", *GRADIENTS},
    ScaleInForwardAlone: GRADIENTS,
    SwappedAdapters: {"output", "x.grad", "weights.grad", *GRADIENTS},
    FrozenA: {"lora_gate_and_up_A.grad", "lora_down_A.grad"},
    TokensWithoutAdapterGradient: {"x.grad"},
}
