"""FP8 on a CPU: an expert layer whose products quantise their operands, right as it is, and with one fault each.

Named as a user would name them, `fp8:Current`, with this folder on PYTHONPATH. Each class of faults holds for every
recipe; `FAULTS` lists them.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from experts import GroupedExperts
from experts.activations import get_expert_activation_for_deepep
from moebench.quantization import fp8_product


class Fp8Experts(GroupedExperts):
    """One expert after the other, sums in float32; faults change one step of it."""

    fp8: ClassVar[str]
    headroom = 1.0
    factor = 1.0
    which=0
    where='gate'

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        if self.headroom == 1.0:
            return fp8_product(self.fp8)(a, b)
        return _Headroom.apply(a, b, self.fp8, self.headroom)

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        out_RD = torch.zeros_like(x_RD, dtype=torch.float32)
        for expert in range(self.n_local_experts):
            rows_N, choices_N = torch.where(indices_RK == expert + self.first_local_expert)
            out_RD = out_RD.index_add(0, rows_N, self.expert(expert, x_RD[rows_N], weights_RK[rows_N, choices_N]))
        return out_RD.to(x_RD.dtype)

    def expert(self, expert: int, x_ND: Tensor, weights_N: Tensor) -> Tensor:
        p = self.expert_parameters()
        weights_N1 = weights_N.float().unsqueeze(-1)
        up=p.gate_and_up_projs[expert]; down=p.down_projs[expert]
        if expert==self.which and self.where=='gate': up=up*self.factor
        if expert==self.which and self.where=='down': down=down*self.factor
        h = self.multiply(x_ND, up)
        if p.gate_up_proj_bias is not None:
            h = h + p.gate_up_proj_bias[expert]
        a = get_expert_activation_for_deepep(self.config)(h, weights_N1)
        y = self.multiply(a, down).float()
        if p.down_proj_bias is not None:
            y = y + p.down_proj_bias[expert].float() * weights_N1
        return y


from moebench import quantization as q
from torch.nn import functional as F

def quant(values, block, fmt, headroom):
    values = values.float()
    if values.numel()==0: return values
    largest = (values.abs().max() if block is None else q._block_maxima(values, block)) 
    scale = torch.finfo(fmt).max / largest.clamp(min=1e-30) / headroom
    if block is not None: scale = torch.exp2(torch.floor(torch.log2(scale)))* (1/headroom)
    return (values*scale).to(fmt).float()/scale

class _Headroom(Function):
    @staticmethod
    def forward(ctx, a, b, recipe, headroom):
        ctx.save_for_backward(a, b); ctx.recipe=recipe; ctx.headroom=headroom
        bl = q.BLOCKS.get(recipe,(None,None))
        return (quant(a,bl[0],q.E4M3,headroom)@quant(b,bl[1],q.E4M3,headroom)).to(a.dtype)
    @staticmethod
    def backward(ctx, g):
        a,b=ctx.saved_tensors; r=ctx.recipe; h=ctx.headroom
        bl = q.BLOCKS.get(r,(None,None)); gf=q.E4M3 if r in q.BLOCKS else q.E5M2
        ga=(quant(g,bl[0],gf,h)@quant(b,bl[1],q.E4M3,h).t()).to(a.dtype)
        gb=(quant(a.t(),bl[0],q.E4M3,h)@quant(g.t(),bl[0],gf,h).t()).to(b.dtype)
        return ga,gb,None,None


class Current(Fp8Experts): fp8="current"
class Block(Fp8Experts): fp8="block"
class CurrentH(Fp8Experts): fp8="current"; headroom=1.37
class BlockH(Fp8Experts): fp8="block"; headroom=1.37
