"""Provide backends with a fault in the number of experts, of choices, or in dimensions; see faulty and hooked."""

import torch
from hooked import Hooked, on_grad, pow2


class DimOddColumn(Hooked):
    """Odd dim: the output's last column is written as a pair with the next row; it stays zero."""

    def combine(self, c, y):
        out = super().combine(c, y)
        return out * (torch.arange(c.D) < c.D - 1) if c.D % 2 else out


class InterOdd(Hooked):
    """Odd moe_inter_dim: the last inner column is left out of the down projection."""

    def down(self, c, e, a):
        return super().down(c, e, a * (torch.arange(c.I) < c.I - 1) if c.I % 2 else a)


class DimNotPow2Grad(Hooked):
    """The gradient of x is zero past the largest power of two in dim. The forward pass is right."""

    def gather(self, c):
        rows = super().gather(c)
        keep = torch.arange(c.D) < 1 << (c.D.bit_length() - 1)
        return rows if pow2(c.D) else on_grad(rows, lambda g: g * keep)


class DimOver1024(Hooked):
    """dim above 1024: the loop over dim in the up projection stops after 1024 columns."""

    def gather(self, c):
        rows = super().gather(c)
        return rows if c.D <= 1024 else rows * (torch.arange(c.D) < 1024)


class InterOver1024Grad(Hooked):
    """moe_inter_dim above 1024: the down projection's gradient is zero in rows past 1024. The forward pass is right."""

    def down(self, c, e, a):
        if c.I <= 1024:
            return super().down(c, e, a)
        p = c.dn[e]
        return (a @ torch.cat([p[:1024], p[1024:].detach()])).to(c.acc)


class SquareDownGrad(Hooked):
    """dim = moe_inter_dim: the gradient of the down projection comes back transposed. The forward pass is right."""

    def down(self, c, e, a):
        p = on_grad(c.dn[e], lambda g: g.t().contiguous()) if c.D == c.I else c.dn[e]
        return (a @ p).to(c.acc)


class InterOne(Hooked):
    """moe_inter_dim 1: the squeezed gate broadcasts, every row gets the mean activation of its expert's rows."""

    def act(self, c, h, w):
        a = super().act(c, h, w)
        return a.mean(0, keepdim=True).expand_as(a) if c.I == 1 and a.shape[0] else a


class DimOne(Hooked):
    """dim 1: the down projection's last dimension is squeezed and its gradient is lost. The forward pass is right."""

    def down(self, c, e, a):
        return (a @ c.dn[e].detach()).to(c.acc) if c.D == 1 else super().down(c, e, a)


class OneExpertUnweighted(Hooked):
    """One expert: the dense path takes every routing weight for 1."""

    def row_weights(self, c):
        w = super().row_weights(c)
        return w if self.n_routed_experts > 1 else torch.ones_like(w)


class TwoExpertsComplement(Hooked):
    """Two experts, two choices: the second weight is taken as 1 minus the first."""

    def compute_local(self, x, w, idx):
        if self.n_routed_experts == 2 and w.shape[1] == 2:
            w = torch.stack([w[:, 0], 1 - w[:, 0]], dim=1)
        return super().compute_local(x, w, idx)


class Experts64Mask(Hooked):
    """More than 64 experts: a 64-bit mask of the used experts; experts from 64 on are skipped."""

    def plan(self, c):
        c.idx = c.idx.masked_fill(c.idx > 63, -1)
        return super().plan(c)


class Experts256Byte(Hooked):
    """More than 256 experts: expert numbers are kept in a byte, expert 256 runs as expert 0."""

    def plan(self, c):
        c.idx = torch.where(c.idx >= 0, c.idx & 255, c.idx)
        return super().plan(c)


class Experts256Grad(Hooked):
    """The up projection's gradient is written for the first 256 experts only. The forward pass is right."""

    def up(self, c, e, xr):
        if e < 256:
            return super().up(c, e, xr)
        h = xr @ c.gu[e].detach()
        return h if c.gub is None else h + c.gub[e]


class Experts1024Block(Hooked):
    """1024 experts (a full thread block): the last expert's rows are not counted and drop out."""

    def plan(self, c):
        if self.n_routed_experts == 1024:
            c.idx = c.idx.masked_fill(c.idx == 1023, -1)
        return super().plan(c)


class TopOneBiasUnweighted(Hooked):
    """Top-1 with bias only: the down bias is not scaled by the routing weight."""

    def finish(self, c, e, y, wr):
        if c.K == 1 and c.db is not None:
            return super().finish(c, e, y, wr) + c.db[e].to(c.acc) * (1 - wr).unsqueeze(-1)
        return super().finish(c, e, y, wr)


class TopOneNoWeightGrad(Hooked):
    """Top-1: the routing weight's gradient is zero. The forward pass is right."""

    def row_weights(self, c):
        w = super().row_weights(c)
        return on_grad(w, torch.zeros_like) if c.K == 1 else w


class TopKOver8(Hooked):
    """More than 8 choices: the sum over a token's choices stops after the eighth."""

    def combine(self, c, y):
        return super().combine(c, y * (c.slots % c.K < 8).unsqueeze(-1))


class TopKOver8InputGrad(Hooked):
    """More than 8 choices: the gradient of x sums the first 8 choices. The forward pass is right."""

    def gather(self, c):
        keep = (c.slots % c.K < 8).unsqueeze(-1)
        return on_grad(super().gather(c), lambda g: g * keep)


class TopKAllPositions(Hooked):
    """Top-k is all experts: weights are read by expert number, as though the choices were in order."""

    def compute_local(self, x, w, idx):
        if w.shape[1] == self.n_routed_experts > 1:
            w = w.gather(1, idx.clamp(min=0))
        return super().compute_local(x, w, idx)


class EmptyCompacted(Hooked):
    """Experts without rows are taken out of the groups but not of the weights: later groups use an earlier expert."""

    def plan(self, c):
        slots, counts = super().plan(c)
        used = [n for n in counts if n]
        return slots, used + [0] * (c.E - len(used))
