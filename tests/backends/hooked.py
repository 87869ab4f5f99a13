"""Provide a plain, right layer with hooks. Faulty and right backends differ from it by a hook.

The other modules of this folder import it as `hooked`, so that a process needs only this folder on PYTHONPATH.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from experts import GroupedExperts

NAMES = ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias")


class _OnGrad(Function):
    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def on_grad(x, change):
    """Return the same tensor. In backward, `change` replaces its gradient."""
    return _OnGrad.apply(x, change)


class _ValueOf(Function):
    @staticmethod
    def forward(ctx, value, like):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def value_grad(value, like):
    """Return the value of one tensor with the gradient of another of the same shape."""
    return _ValueOf.apply(value.detach(), like)


def pow2(number):
    """Whether the number is a power of two."""
    return number & (number - 1) == 0


class Hooked(GroupedExperts):
    """A right layer: rows sorted by expert, one product per expert, sums in float32. Autocast changes nothing.

    Its methods share a namespace `c` for the time of a call: x, the routing weights w [T, K] and the indices idx [T, K]
    (−1 where masked or not chosen), the sizes T, K, E, D and I, the dtype of sums `acc`, the parameters gu, dn, gub and
    db of each expert, and the `slots` (numbers of choices, in the order of experts) with their `tokens` and the
    experts' `counts`.
    """

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x, token_mask, weights, indices)

    def compute_local(self, x, w, idx):
        c = SimpleNamespace(x=x, w=w, idx=idx, T=idx.shape[0], K=idx.shape[1])
        c.acc = torch.promote_types(x.dtype, torch.float32)
        c.E, c.D, c.I = self.n_local_experts, self.config.dim, self.config.moe_inter_dim
        c.after = self.config.apply_router_weight_after_down
        c.gu, c.dn, c.gub, c.db = (None if p is None else p.unbind(0) for p in self.cast(c))
        c.slots, c.counts = self.plan(c)
        c.tokens = c.slots // c.K
        rows = self.gather(c).split(c.counts)
        weights = self.row_weights(c).split(c.counts)
        y = torch.cat([self.expert(c, e, rows[e], weights[e]) for e in range(c.E)])
        return self.combine(c, y).to(x.dtype)

    def cast(self, c):
        """Return the parameters in x's dtype."""
        return [None if p is None else p.to(c.x.dtype) for p in self.expert_parameters()]

    def local(self, c):
        """Return the local number of the expert of each choice [T·K]; E for a choice of none."""
        flat = c.idx.reshape(-1) - self.first_local_expert
        return torch.where((flat >= 0) & (flat < c.E), flat, c.E)

    def plan(self, c):
        """Return the slots in the order of experts, and the number of rows of each expert."""
        flat = self.local(c)
        counts = torch.bincount(flat, minlength=c.E + 1)[: c.E].tolist()
        return torch.argsort(flat, stable=True)[: sum(counts)], counts

    def gather(self, c):
        """Return the rows of x in the order of the slots. The gradient of x is summed in float32."""
        return c.x.to(c.acc)[c.tokens].to(c.x.dtype)

    def row_weights(self, c):
        """Return the routing weight of each slot."""
        return c.w.reshape(-1)[c.slots].to(c.acc)

    def expert(self, c, e, xr, wr):
        """Return what expert e adds to its rows xr with the routing weights wr."""
        a = self.act(c, self.up(c, e, xr), torch.ones_like(wr) if c.after else wr)
        return self.finish(c, e, self.down(c, e, a), wr)

    def up(self, c, e, xr):
        """Return the first projection of the rows."""
        h = xr @ c.gu[e]
        return h if c.gub is None else h + c.gub[e]

    def act(self, c, h, w):
        """Return the activation of h, times w."""
        return (self.formula(h.to(c.acc)) * w.unsqueeze(-1)).to(h.dtype)

    def formula(self, h):
        """Return the activation of h."""
        if self.config.expert_activation == "relu2":
            return F.relu(h).square()
        return self.glu(*self.halves(h))

    def halves(self, h):
        """Return gate and up."""
        if self.config.expert_activation == "quick_geglu":
            return h[..., ::2], h[..., 1::2]
        return h.chunk(2, dim=-1)

    def glu(self, g, u):
        """Return the gated activation."""
        cfg = self.config
        if cfg.expert_activation == "geglu":
            return F.gelu(g, approximate="tanh") * u
        if cfg.expert_activation == "swiglu":
            if cfg.swiglu_limit > 0:
                g, u = g.clamp(max=cfg.swiglu_limit), u.clamp(-cfg.swiglu_limit, cfg.swiglu_limit)
            return F.silu(g) * u
        g, u = g.clamp(max=cfg.activation_limit), u.clamp(-cfg.activation_limit, cfg.activation_limit)
        return g * torch.sigmoid(cfg.activation_alpha * g) * (u + 1)

    def down(self, c, e, a):
        """Return the second projection, without bias."""
        return (a @ c.dn[e]).to(c.acc)

    def finish(self, c, e, y, wr):
        """Add the second bias, and apply the routing weight where it comes after the projection."""
        if c.after:
            return self.plus_bias(c, e, y) * wr.unsqueeze(-1)
        return y if c.db is None else y + c.db[e].to(c.acc) * wr.unsqueeze(-1)

    def plus_bias(self, c, e, y):
        """Return y with the second bias."""
        return y if c.db is None else y + c.db[e].to(c.acc)

    def combine(self, c, y):
        """Return the sum over each token's rows."""
        return torch.zeros(c.T, c.D, dtype=c.acc, device=y.device).index_add(0, c.tokens, y)
