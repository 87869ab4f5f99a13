"""Provide backends that round more coarsely than the loop, as many kernels do.

The coarser rounding is not a fault, because the backends round to the tokens' dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from experts import GroupedExperts, GroupedExpertsLoRA
from experts.compute import ExpertParameters
from experts.compute.loop import expert_forward, split_experts


def _in_dtype(layer: GroupedExperts, dtype: torch.dtype) -> ExpertParameters:
    return ExpertParameters(*(None if p is None else p.to(dtype) for p in layer.expert_parameters()))


class SumInDtype(GroupedExperts):
    """A token's expert outputs, and their gradients, are summed in the tokens' dtype. The loop sums in float32."""

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        out_RD = torch.zeros_like(x_RD)
        for index, expert in enumerate(split_experts(_in_dtype(self, x_RD.dtype))):
            rows_N, choices_N = torch.where(indices_RK == index)
            y_ND = self.expert(x_RD[rows_N], weights_RK[rows_N, choices_N], expert)
            out_RD = out_RD.index_add(0, rows_N, y_ND.to(x_RD.dtype))
        return out_RD

    def expert(self, x_ND: Tensor, weights_N: Tensor, expert: ExpertParameters) -> Tensor:
        """Return what one expert adds to its rows [N, D]."""
        return expert_forward(x_ND, weights_N, expert, self.config)


class BackToFront(GroupedExperts):
    """The experts, and the elements of each sum, are added up from the last to the first."""

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        out_RD = torch.zeros_like(x_RD)
        for index, expert in reversed(list(enumerate(split_experts(_in_dtype(self, x_RD.dtype))))):
            rows_N, choices_N = torch.where(indices_RK == index)
            rows_N, choices_N = rows_N.flip(0), choices_N.flip(0)
            turned = expert._replace(gate_and_up_projs=expert.gate_and_up_projs.flip(0))
            y_ND = expert_forward(x_RD[rows_N].flip(1), weights_RK[rows_N, choices_N], turned, self.config)
            out_RD = out_RD.index_add(0, rows_N, y_ND.to(x_RD.dtype))
        return out_RD


class ActivationInDtype(SumInDtype):
    """Like SumInDtype. Each step of swiglu, with the routing weight, is also rounded to the tokens' dtype."""

    def expert(self, x_ND: Tensor, weights_N: Tensor, expert: ExpertParameters) -> Tensor:
        config = self.config
        if config.expert_activation != "swiglu" or config.swiglu_limit or config.apply_router_weight_after_down:
            return super().expert(x_ND, weights_N, expert)
        weights_N1 = weights_N.to(x_ND.dtype).unsqueeze(-1)
        h_NI = x_ND @ expert.gate_and_up_projs
        h_NI = h_NI if expert.gate_up_proj_bias is None else h_NI + expert.gate_up_proj_bias
        gate_NI, up_NI = h_NI.chunk(2, dim=-1)
        y_ND = (F.silu(gate_NI) * up_NI * weights_N1) @ expert.down_projs
        return y_ND if expert.down_proj_bias is None else y_ND + expert.down_proj_bias * weights_N1


class SummedAdapters(GroupedExpertsLoRA):
    """Each weight is added to scale · A @ B in the tokens' dtype, and the loop computes with the sum."""

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        parameters, adapters = _in_dtype(self, x_RD.dtype), self.expert_adapters().to(x_RD.dtype)
        up_A, up_B, down_A, down_B = adapters.tensors
        summed = parameters._replace(
            gate_and_up_projs=parameters.gate_and_up_projs + adapters.scale * (up_A @ up_B),
            down_projs=parameters.down_projs + adapters.scale * (down_A @ down_B),
        )
        return self.engine.compute(x_RD, weights_RK, indices_RK, summed, self.config, self.first_local_expert)
