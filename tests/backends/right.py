"""Provide right backends that differ from the loop: in orders of sums, in groupings, and in their gradients."""

import math

import torch
from hooked import Hooked
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class ReversedExperts(Hooked):
    """Experts are computed from the last to the first, and their rows are summed in that order."""

    def combine(self, c, y):
        return torch.zeros(c.T, c.D, dtype=c.acc).index_add(0, c.tokens.flip(0), y.flip(0))


class RandomOrder(Hooked):
    """Rows of one expert come in a new random order at each call (equal calls may differ in the last bits)."""

    rng = None

    def plan(self, c):
        self.rng = self.rng or torch.Generator().manual_seed(1)
        slots, counts = super().plan(c)
        return torch.cat([p[torch.randperm(len(p), generator=self.rng)] for p in slots.split(counts)]), counts


class RowChunks(Hooked):
    """Each expert's rows are done in chunks of 5; the parameters' gradients add up over chunks."""

    def expert(self, c, e, xr, wr):
        if len(xr) <= 5 or xr.dtype not in (torch.float32, torch.float64):
            return super().expert(c, e, xr, wr)
        return torch.cat(
            [super(RowChunks, self).expert(c, e, x, w) for x, w in zip(xr.split(5), wr.split(5), strict=False)]
        )


class DimChunks(Hooked):
    """The up projection sums over chunks of 7 columns of x, in float32 (float64)."""

    def up(self, c, e, xr):
        parts = zip(xr.split(7, dim=1), c.gu[e].split(7, dim=0), strict=False)
        h = sum(x.to(c.acc) @ p.to(c.acc) for x, p in parts).to(xr.dtype)
        return h if c.gub is None else h + c.gub[e]


class InterChunks(Hooked):
    """The down projection sums over chunks of 5 inner columns, in float32 (float64)."""

    def down(self, c, e, a):
        return sum(x.to(c.acc) @ p.to(c.acc) for x, p in zip(a.split(5, dim=1), c.dn[e].split(5, dim=0), strict=False))


class SplitKTwo(Hooked):
    """Both projections are split into two halves of the summed dimension, added last half first."""

    def up(self, c, e, xr):
        n = c.D // 2
        p, x = c.gu[e].to(c.acc), xr.to(c.acc)
        h = (x[:, n:] @ p[n:] + x[:, :n] @ p[:n]).to(xr.dtype)
        return h if c.gub is None else h + c.gub[e]

    def down(self, c, e, a):
        n = c.I // 2
        p, x = c.dn[e].to(c.acc), a.to(c.acc)
        return x[:, n:] @ p[n:] + x[:, :n] @ p[:n]


class Float32Products(Hooked):
    """Operands rounded to x's dtype, products and activations in float32 without rounding in between."""

    def up(self, c, e, xr):
        h = xr.to(c.acc) @ c.gu[e].to(c.acc)
        return h if c.gub is None else h + c.gub[e].to(c.acc)

    def act(self, c, h, w):
        return self.formula(h) * w.unsqueeze(-1)

    def down(self, c, e, a):
        return a.to(c.acc) @ c.dn[e].to(c.acc)


class SumLastChoiceFirst(Hooked):
    """Rows are summed over the choices one after another, the last choice first."""

    def combine(self, c, y):
        rows = torch.zeros(c.T * c.K, c.D, dtype=c.acc).index_copy(0, c.slots, y).view(c.T, c.K, c.D)
        total = rows[:, -1]
        for k in range(c.K - 2, -1, -1):
            total = total + rows[:, k]
        return total


class PaddedTiles(Hooked):
    """Each expert's rows are padded with zero rows to a multiple of 16."""

    def expert(self, c, e, xr, wr):
        extra = -len(xr) % 16
        return super().expert(c, e, F.pad(xr, (0, 0, 0, extra)), F.pad(wr, (0, extra)))[: len(xr)]


class DenseOneHot(Hooked):
    """Every expert computes every token; a one-hot routing matrix picks and weights the results."""

    def compute_local(self, x, w, idx):
        live = idx >= 0
        x = x.masked_fill(~live.any(1, keepdim=True), 0)
        w = w.masked_fill(~live, 0)
        acc = torch.promote_types(x.dtype, torch.float32)
        E = self.n_local_experts
        local = idx - self.first_local_expert
        mine = live & (local >= 0) & (local < E)
        routing = torch.zeros(len(x), E + 1, dtype=acc).scatter_add(1, torch.where(mine, local, E), w.to(acc))[:, :E]
        up, down, up_bias, down_bias = (None if p is None else p.to(x.dtype) for p in self.expert_parameters())
        h = torch.einsum("td,edh->eth", x, up)
        h = h if up_bias is None else h + up_bias.unsqueeze(1)
        a = self.formula(h.to(acc)).to(x.dtype)
        y = torch.einsum("eti,eid->etd", a, down).to(acc)
        y = y if down_bias is None else y + down_bias.to(acc).unsqueeze(1)
        return torch.einsum("te,etd->td", routing, y).to(x.dtype)


class GateUpApart(Hooked):
    """Gate and up are two products with the two parts of the matrix."""

    def up(self, c, e, xr):
        if self.config.expert_activation == "relu2":
            return super().up(c, e, xr)
        gate, up = self.halves(c.gu[e])
        h = (xr @ gate, xr @ up)
        if self.config.expert_activation == "quick_geglu":
            h = torch.stack(h, dim=-1).flatten(-2)
        else:
            h = torch.cat(h, dim=-1)
        return h if c.gub is None else h + c.gub[e]


class MergedDuplicates(Hooked):
    """An expert that a token chose twice is computed once with the sum of the weights."""

    def compute_local(self, x, w, idx):
        if len(idx) == 0:
            return super().compute_local(x, w, idx)
        w = w.masked_fill(idx < 0, 0).to(torch.promote_types(w.dtype, torch.float32))
        same = (idx.unsqueeze(2) == idx.unsqueeze(1)) & (idx >= 0).unsqueeze(2)
        later = torch.tril(same, diagonal=-1).any(2)
        return super().compute_local(x, (same.to(w.dtype) @ w.unsqueeze(2)).squeeze(2), idx.masked_fill(later, -1))


class SkipsEmpty(Hooked):
    """Experts without rows are not computed; a product with zero gives them gradients of zeros."""

    def compute_local(self, x, w, idx):
        return super().compute_local(x, w, idx)

    def expert(self, c, e, xr, wr):
        if len(xr):
            return super().expert(c, e, xr, wr)
        touch = c.gu[e].sum() * 0 + c.dn[e].sum() * 0
        for b in (c.gub, c.db):
            touch = touch if b is None else touch + b[e].sum() * 0
        return (c.x.new_zeros(0, c.D) * touch).to(c.acc) + xr.sum().to(c.acc) * 0 + wr.sum() * 0


class CompactsTokens(Hooked):
    """Masked tokens are taken out before the computation, and zero rows put back after it."""

    def forward(self, x, token_mask, weights, indices):
        kept = token_mask.nonzero().flatten()
        y = super().forward(x[kept], token_mask[kept], weights[kept], indices[kept])
        return torch.zeros(x.shape, dtype=y.dtype).index_copy(0, kept, y)


class WeightAfter(Hooked):
    """The routing weight is always applied after the down projection (the projection is linear)."""

    def expert(self, c, e, xr, wr):
        a = self.act(c, self.up(c, e, xr), torch.ones_like(wr))
        return self.plus_bias(c, e, self.down(c, e, a)) * wr.unsqueeze(-1)


class Checkpointed(Hooked):
    """Each call is recomputed in backward (non-reentrant checkpoint inside the layer)."""

    def compute_local(self, x, w, idx):
        if not torch.is_grad_enabled():
            return super().compute_local(x, w, idx)
        return checkpoint(super().compute_local, x, w, idx, use_reentrant=False)


class SigmoidForms(Hooked):
    """silu and gelu by other formulas: g·(1 + tanh(g/2))/2, and the tanh gelu as g·sigmoid(2z)."""

    def glu(self, g, u):
        cfg = self.config
        if cfg.expert_activation == "geglu":
            return g * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g * g * g)) * u
        if cfg.expert_activation == "swiglu":
            limit = cfg.swiglu_limit or math.inf
            g, u = torch.minimum(g, torch.full_like(g, limit)), u.clamp(-limit, limit)
            return g * (0.5 + 0.5 * torch.tanh(0.5 * g)) * u
        return super().glu(g, u)


class _Pick(Function):
    @staticmethod
    def forward(ctx, x, tokens):
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype = x.shape[0], x.dtype
        return x[tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (tokens,) = ctx.saved_tensors
        acc = torch.promote_types(grad.dtype, torch.float32)
        out = torch.zeros(ctx.rows, grad.shape[1], dtype=acc)
        return out.index_add_(0, tokens, grad.to(acc)).to(ctx.dtype), None


class OwnGather(Hooked):
    """The gather is an autograd.Function that sums the gradient in float32."""

    def gather(self, c):
        return _Pick.apply(c.x, c.tokens)


class _Matmul(Function):
    @staticmethod
    def forward(ctx, a, p):
        ctx.save_for_backward(a, p)
        return a @ p

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, p = ctx.saved_tensors
        da = grad @ p.t() if ctx.needs_input_grad[0] else None
        dp = a.t() @ grad if ctx.needs_input_grad[1] else None
        return da, dp


class OwnProducts(Hooked):
    """Both projections are autograd.Functions, which compute the wanted gradients only."""

    def up(self, c, e, xr):
        h = _Matmul.apply(xr, c.gu[e])
        return h if c.gub is None else h + c.gub[e]

    def down(self, c, e, a):
        return _Matmul.apply(a, c.dn[e]).to(c.acc)


class _SiluGlu(Function):
    @staticmethod
    def forward(ctx, g, u, w):
        ctx.save_for_backward(g, u, w)
        return g * torch.sigmoid(g) * u * w

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        g, u, w = ctx.saved_tensors
        s = torch.sigmoid(g)
        a = g * s
        return grad * w * u * s * (1 + g * (1 - s)), grad * w * a, (grad * a * u).sum(1, keepdim=True)


class _Relu2(Function):
    @staticmethod
    def forward(ctx, h, w):
        ctx.save_for_backward(h, w)
        r = h.clamp(min=0)
        return r * r * w

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, w = ctx.saved_tensors
        r = h.clamp(min=0)
        return 2 * r * w * grad, (r * r * grad).sum(1, keepdim=True)


class OwnActivation(Hooked):
    """relu2 and swiglu with hand-written gradients."""

    def act(self, c, h, w):
        cfg = self.config
        if cfg.expert_activation == "relu2":
            return _Relu2.apply(h.to(c.acc), w.unsqueeze(-1)).to(h.dtype)
        if cfg.expert_activation == "swiglu":
            g, u = self.halves(h.to(c.acc))
            if cfg.swiglu_limit:
                g, u = g.clamp(max=cfg.swiglu_limit), u.clamp(-cfg.swiglu_limit, cfg.swiglu_limit)
            return _SiluGlu.apply(g, u, w.unsqueeze(-1)).to(h.dtype)
        return super().act(c, h, w)
