"""Provide backends that are right except for one fault each. `moebench` must report a mismatch for each backend.

With this folder on PYTHONPATH, a test names a backend as a user would, for example `faulty:SwappedExperts`. `FAULTS`
lists the tensors in which a measured job must find each fault. The faults in faulty_rows and faulty_weights are for
`moebench parity`, and a measured job does not find some of these faults. Apart from its fault, each backend is right,
also without tokens and with one expert. A fault can be planted before any layer that is a `GroupedExperts`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from experts import GroupedExperts
from experts.compute import ExpertParameters


def busiest(indices_TK: Tensor, count: int) -> list[int]:
    """Return the `count` experts with the most tokens. A fault in one of these experts changes the result."""
    return (indices_TK.flatten().long() + 1).bincount(minlength=count + 2)[1:].topk(count).indices.tolist()


class SwappedExperts(GroupedExperts):
    """Two experts are exchanged, as after loading the experts in lexicographic order."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        if self.n_routed_experts == 1:
            return super().forward(x, token_mask, weights, indices)
        one, other = busiest(indices, 2)
        swapped = torch.where(indices == one, other, torch.where(indices == other, one, indices))
        return super().forward(x, token_mask, weights, swapped)


class MissingRoutingWeight(GroupedExperts):
    """Every chosen expert has weight 1. The routing weights still get a gradient, which is zero."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return super().forward(x, token_mask, weights * 0 + 1, indices)


class DetachedRoutingWeight(GroupedExperts):
    """The gradient of the routing weights is lost, as in an all_gather without autograd. The forward pass is right."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return super().forward(x, token_mask, weights.detach(), indices)


class UnweightedDownBias(GroupedExperts):
    """The down projection's bias is added without the routing weight."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        right = super().forward(x, token_mask, weights, indices)
        if self.down_proj_bias is None:
            return right
        is_active = token_mask.unsqueeze(-1) & (indices.long() >= 0)
        missing = (
            torch.where(is_active, 1 - weights, 0.0).unsqueeze(-1) * self.down_proj_bias[indices.long().clamp(min=0)]
        )
        return right + missing.sum(dim=1).to(right.dtype)


class DroppedToken(GroupedExperts):
    """One token is dropped."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        is_first = token_mask & (token_mask.cumsum(0) == 1)
        return super().forward(x, token_mask & ~is_first, weights, indices)


class UnwrittenRow(GroupedExperts):
    """The last row of the output is never written. The row holds what was in the memory before."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        right = super().forward(x, token_mask, weights, indices)
        return torch.cat([right[:-1], torch.empty_like(right[-1:])])


class LeakingMask(GroupedExperts):
    """The sum of all rows, also masked rows, is added times zero. A value that is not finite spreads to all tokens."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return super().forward(x, token_mask, weights, indices) + x.sum() * 0


class ZeroGradOfOneExpert(GroupedExperts):
    """The gradient of one expert's down projection is zero."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        (self._frozen,) = busiest(indices, 1)
        return super().forward(x, token_mask, weights, indices)

    def expert_parameters(self) -> ExpertParameters:
        right = super().expert_parameters()
        frozen_E = torch.arange(len(right.down_projs)) == self._frozen
        return right._replace(
            down_projs=torch.where(frozen_E[:, None, None], right.down_projs.detach(), right.down_projs)
        )


class UnwrittenGradOfEmptyExperts(GroupedExperts):
    """The weight gradient of an expert without tokens is never written. A kernel visits only groups with rows."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        rows_E = (indices[token_mask].flatten().long() + 1).bincount(minlength=self.n_routed_experts + 1)[1:]
        self._has_rows_E = rows_E > 0
        return super().forward(x, token_mask, weights, indices)

    def expert_parameters(self) -> ExpertParameters:
        right = super().expert_parameters()
        return right._replace(gate_and_up_projs=_WriteSomeGrads.apply(right.gate_and_up_projs, self._has_rows_E))


class _WriteSomeGrads(Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, written_E: Tensor) -> Tensor:
        ctx.save_for_backward(written_E)
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (written_E,) = ctx.saved_tensors
        written = torch.empty_like(grad)
        written[written_E] = grad[written_E]
        return written, None


class ScaledExpert(GroupedExperts):
    """One expert's rows are 2% too large."""

    factor = 1.02

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        (expert,) = busiest(indices, 1)
        return super().forward(x, token_mask, torch.where(indices == expert, self.factor * weights, weights), indices)


class WrongWhenWarm(GroupedExperts):
    """The first five calls, which are checked, are right. The later calls, which are timed, are wrong."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._num_calls = 0

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        self._num_calls += 1
        return super().forward(x, token_mask, weights, indices) * (1.5 if self._num_calls > 5 else 1.0)


class ZeroedInputs(GroupedExperts):
    """The layer overwrites its inputs with zeros. Its output is right for the overwritten inputs."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        with torch.no_grad():
            x.zero_()
            weights.zero_()
        return super().forward(x, token_mask, weights, indices)


OUTPUT = {"output"}
#: Fault -> the tensors that a job with mode `train` must find wrong.
FAULTS = {
    "SwappedExperts": OUTPUT | {"x.grad", "weights.grad", "down_projs.grad", "gate_and_up_projs.grad"},
    "MissingRoutingWeight": OUTPUT | {"x.grad", "weights.grad", "down_proj_bias.grad"},
    "DetachedRoutingWeight": {"weights.grad"},
    "UnweightedDownBias": OUTPUT | {"down_proj_bias.grad", "weights.grad"},
    "DroppedToken": OUTPUT | {"x.grad", "weights.grad"},
    "UnwrittenRow": OUTPUT,
    "LeakingMask": OUTPUT,
    "ZeroGradOfOneExpert": {"down_projs.grad"},
    "UnwrittenGradOfEmptyExperts": {"gate_and_up_projs.grad"},
    "ScaledExpert": {"down_projs.grad", "gate_and_up_projs.grad"},
    "WrongWhenWarm": OUTPUT,
    "ZeroedInputs": OUTPUT,
}
