"""Provide backends with a fault for some activations, routing weights or masks; see faulty and hooked."""

import torch
from hooked import Hooked, on_grad, value_grad
from torch.nn import functional as F


class Act(Hooked):
    """Right; the hooks below see the name of the activation."""

    @property
    def name(self):
        return self.config.expert_activation


class GegluExact(Act):
    """geglu: the exact (erf) gelu instead of the tanh form."""

    def glu(self, g, u):
        return F.gelu(g) * u if self.name == "geglu" else super().glu(g, u)


class GegluTailZero(Act):
    """geglu: gates below -3 count as zero (table of the kernel), gradient too."""

    def glu(self, g, u):
        y = super().glu(g, u)
        return torch.where(g < -3, 0.0, y) if self.name == "geglu" else y


class OaiGateLower(Act):
    """swigluoai: gate is clamped from below at -limit too."""

    def glu(self, g, u):
        return super().glu(g.clamp(min=-self.config.activation_limit) if self.name == "swigluoai" else g, u)


class OaiClampAfterOne(Act):
    """swigluoai: the clamp of up is applied to up + 1."""

    def glu(self, g, u):
        limit = self.config.activation_limit
        if self.name != "swigluoai":
            return super().glu(g, u)
        g = g.clamp(max=limit)
        return g * torch.sigmoid(self.config.activation_alpha * g) * (u + 1).clamp(-limit, limit)


class QuickUpGradLeak(Act):
    """quick_geglu: up beyond ±limit still gets a gradient. The forward pass is right."""

    def glu(self, g, u):
        limit = self.config.activation_limit
        return super().glu(g, value_grad(u.clamp(-limit, limit), u) if self.name == "quick_geglu" else u)


class SwigluUpOneSided(Act):
    """swiglu with a limit: up is clamped from above only."""

    def glu(self, g, u):
        limit = self.config.swiglu_limit
        if self.name != "swiglu" or not limit:
            return super().glu(g, u)
        return F.silu(g.clamp(max=limit)) * u.clamp(max=limit)


class SwigluLimitInt(Act):
    """swiglu: the limit is cut to an integer; limits below 1 become 0, which is no limit."""

    def glu(self, g, u):
        limit = self.config.swiglu_limit
        if self.name != "swiglu" or limit == int(limit):
            return super().glu(g, u)
        limit = int(limit)
        return F.silu(g.clamp(max=limit)) * u.clamp(-limit, limit) if limit else F.silu(g) * u


class SwigluClampGrad(Act):
    """swiglu with a limit: forward is clamped, backward is that of the layer without limit."""

    def glu(self, g, u):
        y = super().glu(g, u)
        return value_grad(y, F.silu(g) * u) if self.name == "swiglu" and self.config.swiglu_limit else y


class SwigluExpNaN(Act):
    """swiglu: silu as g·exp(g)/(1 + exp(g)), NaN for gates above 88."""

    def glu(self, g, u):
        if self.name != "swiglu" or self.config.swiglu_limit:
            return super().glu(g, u)
        z = torch.exp(g)
        return g * z / (1 + z) * u


class Relu2GradHalf(Act):
    """relu2: the gradient is relu(x) instead of 2·relu(x). The forward pass is right."""

    def formula(self, h):
        y = super().formula(h)
        return value_grad(y, F.relu(h) * F.relu(h).detach()) if self.name == "relu2" else y


class Relu2NegativeGrad(Act):
    """relu2: the gradient is 2x for negative x too. The forward pass is right."""

    def formula(self, h):
        y = super().formula(h)
        return value_grad(y, h.square()) if self.name == "relu2" else y


class ZeroWeightSkipped(Hooked):
    """A weight of exactly 0 drops the choice: its routing weight gets no gradient. The forward pass is right."""

    def compute_local(self, x, w, idx):
        return super().compute_local(x, w, idx.masked_fill(w.detach() == 0, -1))


class NegativeWeightZero(Hooked):
    """Negative routing weights count as 0 (`weight > 0` tests whether the choice is local)."""

    def row_weights(self, c):
        return super().row_weights(c).clamp(min=0)


class WeightAboveOne(Hooked):
    """Routing weights above 1 count as 1 (kept as a fraction)."""

    def row_weights(self, c):
        return super().row_weights(c).clamp(max=1)


class MinusOneNaNWeight(Hooked):
    """NaN in the routing weight of a -1 choice leaks into the token's output (multiplied by zero)."""

    def compute_local(self, x, w, idx):
        y = super().compute_local(x, w, idx)
        dead = (idx < 0) & (idx >= 0).any(1, keepdim=True)
        return y + (w * dead).sum(1, keepdim=True).detach().to(y.dtype) * 0


class MinusOneNaNGrad(Hooked):
    """NaN in the routing weight of a -1 choice leaks into the gradient of x. The forward pass is right."""

    def compute_local(self, x, w, idx):
        leak = (w * (idx < 0)).sum(1, keepdim=True).detach() * 0
        return super().compute_local(on_grad(x, lambda g: (g + leak).to(g.dtype)), w, idx)


class DuplicateWeightGrad(Hooked):
    """The sum of a repeated expert's weights is right, but its gradient goes to the first of them only."""

    def compute_local(self, x, w, idx):
        again = torch.tril((idx.unsqueeze(2) == idx.unsqueeze(1)), diagonal=-1).any(2)
        return super().compute_local(x, on_grad(w, lambda g: g.masked_fill(again, 0)), idx)


class DuplicateInputGrad(Hooked):
    """A repeated expert's rows overwrite each other in the gradient of x. The forward pass is right."""

    def gather(self, c):
        again = torch.tril((c.idx.unsqueeze(2) == c.idx.unsqueeze(1)), diagonal=-1).any(2).reshape(-1)
        keep = (~again[c.slots]).unsqueeze(-1)
        return on_grad(super().gather(c), lambda g: g * keep)


class MaskByMultiply(Hooked):
    """The mask multiplies the output and leaves NaN of a masked token's row of x in it and in the gradients."""

    def forward(self, x, token_mask, weights, indices):
        y = super().forward(x, torch.ones_like(token_mask), weights, indices)
        return y * token_mask.unsqueeze(-1).to(y.dtype)


class MaskAllFalse(Hooked):
    """A mask without any True counts as no mask."""

    def forward(self, x, token_mask, weights, indices):
        return super().forward(x, token_mask if token_mask.any() else ~token_mask, weights, indices)


class MaskFirstOnly(Hooked):
    """Only token 0 kept: its position 0 is taken for "none", everything is zero."""

    def forward(self, x, token_mask, weights, indices):
        kept = token_mask.nonzero().flatten()
        if kept.numel() == 1 and not int(kept[0]):
            token_mask = torch.zeros_like(token_mask)
        return super().forward(x, token_mask, weights, indices)


class MaskLastOnly(Hooked):
    """Only the last token kept: the output row lands in the first place."""

    def forward(self, x, token_mask, weights, indices):
        y = super().forward(x, token_mask, weights, indices)
        if token_mask.shape[0] > 1 and token_mask[-1] and token_mask.sum() == 1:
            y = y.roll(1, 0)
        return y


class MaskLastOff(Hooked):
    """A mask that is False for the last token only is not noticed (checked without the last element)."""

    def forward(self, x, token_mask, weights, indices):
        if bool(token_mask[:-1].all()):
            token_mask = torch.ones_like(token_mask)
        return super().forward(x, token_mask, weights, indices)


class MaskAsPrefix(Hooked):
    """The mask is taken for padding at the end: the first mask.sum() tokens are kept."""

    def forward(self, x, token_mask, weights, indices):
        token_mask = torch.arange(x.shape[0]) < token_mask.sum()
        return super().forward(x, token_mask, weights, indices)
