"""Provide backends with faults that show only in a context of training.

Apart from its fault, each backend is right, and a plain pass of forward and backward does not show the fault.
"""

import torch
from torch import Tensor

from experts import GroupedExperts
from experts.compute import ExpertParameters


class RecomputesOtherRows(GroupedExperts):
    """Backward under activation checkpointing runs forward again with the tokens' rows in reverse order."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() >= 0:
            x = x.flip(0)
        return super().forward(x, token_mask, weights, indices)


class ScaleLostInAccumulation(GroupedExperts):
    """A gradient that is added to an earlier one of the same parameter is halved: its scale is applied twice."""

    def expert_parameters(self) -> ExpertParameters:
        own = super().expert_parameters()
        is_later = any(parameter.grad is not None for parameter in self.parameters())
        return ExpertParameters(*(_halved(one) if is_later and one is not None else one for one in own))


def _halved(parameter: Tensor) -> Tensor:
    """Return the parameter, of which only half of the gradient comes back."""
    return parameter.detach() / 2 + parameter / 2
