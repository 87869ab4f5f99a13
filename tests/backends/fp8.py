"""FP8 on a CPU: expert layers whose products quantise their operands by a recipe, right ones and ones with one fault.

Named as a user would name them, `fp8:Current`, with this folder on PYTHONPATH. `faulty(fault, recipe)` gives the others.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from experts import BackendConfig, GroupedExperts, MoEConfig
from experts.activations import get_expert_activation_for_deepep
from experts.compute import ExpertParameters
from moebench.quantization import fp8_product


class Fp8Experts(GroupedExperts):
    """One local expert after the other in FP8, summed in float32. A fault changes one step of it."""

    fp8: ClassVar[str]

    def __init__(self, config: MoEConfig, dispatcher: str | None = None) -> None:
        super().__init__(config, BackendConfig(experts="loop", dispatcher=dispatcher))  # type: ignore[arg-type]

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        """The sum over the local experts."""
        self.faulty_expert = int((indices_RK - self.first_local_expert).flatten().clamp(min=-1, max=self.n_local_experts).add(1).bincount(minlength=self.n_local_experts + 2)[1:-1].argmax())
        out_RD = torch.zeros_like(x_RD, dtype=torch.float32)
        for local in range(self.n_local_experts):
            rows_N, choices_N = torch.where(indices_RK == self.first_local_expert + local)
            y_ND = self.expert(local, x_RD[rows_N], weights_RK[rows_N, choices_N].unsqueeze(-1))
            out_RD = out_RD.index_add(0, rows_N, y_ND)
        return out_RD.to(x_RD.dtype)

    def expert(self, local: int, x_ND: Tensor, weights_N1: Tensor) -> Tensor:
        """What one expert adds to its rows, in float32."""
        gate_up, down, gate_up_bias, down_bias = self.weights_of(local)
        h_NI = self.multiply(x_ND, gate_up, f"up {local}")
        if gate_up_bias is not None:
            h_NI = h_NI + gate_up_bias
        a_NI = get_expert_activation_for_deepep(self.config)(h_NI, weights_N1)
        y_ND = self.multiply(a_NI, down, f"down {local}").float()
        return y_ND if down_bias is None else y_ND + self.bias(down_bias.float(), weights_N1)

    def weights_of(self, local: int) -> ExpertParameters:
        """The parameters of one expert."""
        return ExpertParameters(*(None if p is None else p[local] for p in self.expert_parameters()))  # type: ignore[arg-type]

    def multiply(self, a: Tensor, b: Tensor, product: str) -> Tensor:
        """a @ b, for the product of that name."""
        return fp8_product(self.fp8)(a, b)

    def bias(self, down_bias: Tensor, weights_N1: Tensor) -> Tensor:
        """The down projection's bias of each row."""
        return down_bias * weights_N1


class Current(Fp8Experts):
    """Right, by current scaling."""

    fp8 = "current"


class Block(Fp8Experts):
    """Right, by block scaling."""

    fp8 = "block"
class WrongScale(Fp8Experts):
    which="down"; factor=1.5; back=False; pick="most"
    def compute_local(self,x,w,i):
        c=(i.flatten()+1).bincount(minlength=self.n_routed_experts+1)[1:]
        r=super().compute_local
        self.bad=int(c.argmax()) if self.pick=="most" else int(torch.where(c>0,c,10**9).argmin())
        return r(x,w,i)
    def multiply(self, a, b, product):
        y=super().multiply(a,b,product)
        if product!=f"{self.which} {self.bad}": return y
        if self.back:
            if y.requires_grad: y.register_hook(lambda g: g*self.factor)
            return y
        return y+(y*(self.factor-1)).detach()
