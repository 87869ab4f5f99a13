"""Provide backends with a fault if some gradients are wanted, or in repeated backward passes; see faulty and hooked."""

import torch
from hooked import Hooked, on_grad, value_grad
from torch.autograd import Function


class NeedsXGrad(Hooked):
    """x wants no gradient: the layer takes this for inference, nothing gets a gradient."""

    def forward(self, *inputs):
        y = super().forward(*inputs)
        return y if inputs[0].requires_grad else y.detach()


class XOnlyGrad(Hooked):
    """Only x wants a gradient (all parameters frozen): it misses the last choice of each token."""

    def gather(self, c):
        rows = super().gather(c)
        if c.x.requires_grad and not any(p.requires_grad for p in self.parameters()) and not c.w.requires_grad:
            keep = (c.slots % c.K != c.K - 1).unsqueeze(-1)
            return on_grad(rows, lambda g: g * keep)
        return rows


class WeightsOnlyGrad(Hooked):
    """Only the routing weights want a gradient: it is zero."""

    def row_weights(self, c):
        w = super().row_weights(c)
        if c.w.requires_grad and not c.x.requires_grad and not any(p.requires_grad for p in self.parameters()):
            return on_grad(w, torch.zeros_like)
        return w


class FrozenDown(Hooked):
    """down_projs frozen: backward stops there, the up projection's gradient is zero."""

    def cast(self, c):
        p = super().cast(c)
        return p if self.down_projs.requires_grad else [on_grad(p[0], torch.zeros_like), *p[1:]]


class FrozenUp(Hooked):
    """gate_and_up_projs frozen: the gradient of x is zero (its product was part of the same branch)."""

    def gather(self, c):
        rows = super().gather(c)
        return rows if self.gate_and_up_projs.requires_grad else on_grad(rows, torch.zeros_like)


class BiasOnly(Hooked):
    """Only the biases want gradients: the up bias gets None."""

    def up(self, c, e, xr):
        if c.gub is not None and not self.gate_and_up_projs.requires_grad and not c.x.requires_grad:
            return xr @ c.gu[e] + c.gub[e].detach()
        return super().up(c, e, xr)


class WeightsNoGradWanted(Hooked):
    """The routing weights want no gradient: x's gradient is not scaled by them."""

    def act(self, c, h, w):
        y = super().act(c, h, w)
        return y if c.w.requires_grad or c.after else value_grad(y, super().act(c, h, torch.ones_like(w)))


class _FusedWgrad(Function):
    """parameter -> parameter; backward writes .grad itself, as kernels with fused accumulation do."""

    @staticmethod
    def forward(ctx, p, parameter, how):
        ctx.parameter, ctx.how = parameter, how
        return p.view_as(p)

    @staticmethod
    def backward(ctx, grad):
        parameter, grad = ctx.parameter, grad.to(ctx.parameter.dtype)
        if ctx.how == "overwrite" or parameter.grad is None:
            parameter.grad = grad.clone()
        else:
            parameter.grad = parameter.grad + grad
        return None, None, None


class FrozenGetsGrad(Hooked):
    """A frozen down_projs gets a .grad all the same (the kernel accumulates into it itself)."""

    def cast(self, c):
        p = super().cast(c)
        if not self.down_projs.requires_grad and c.x.requires_grad:
            zero = c.x.sum() * 0 if c.x.numel() else c.x.new_zeros(())
            p[1] = _FusedWgrad.apply(p[1] + zero.nan_to_num(), self.down_projs, "add")
        return p


class GradOverwritten(Hooked):
    """The down projection's gradient overwrites .grad instead of adding to it."""

    def cast(self, c):
        p = super().cast(c)
        return [p[0], _FusedWgrad.apply(p[1], self.down_projs, "overwrite"), *p[2:]]


class BiasGradNotAdded(Hooked):
    """If the down bias already has a .grad, nothing is added to it (biases only)."""

    def cast(self, c):
        p = super().cast(c)
        if p[3] is None:
            return p
        return [*p[:3], on_grad(p[3], lambda g: 0 * g if self.down_proj_bias.grad is not None else g)]


class RetainSpent(Hooked):
    """backward frees the saved rows: a second backward with retain_graph gives the up projection a zero gradient."""

    def cast(self, c):
        p = super().cast(c)
        spent = {"n": 0}

        def back(g):
            spent["n"] += 1
            return g if spent["n"] == 1 else 0 * g

        return [on_grad(p[0], back), *p[1:]]


class RetainDoubles(Hooked):
    """A second backward of the same graph (retain_graph) doubles the gradient of x (a buffer is not cleared)."""

    def gather(self, c):
        kept = []

        def back(g):
            kept.append(g)
            return sum(kept)

        return on_grad(super().gather(c), back)


class LastForwardWeights(Hooked):
    """The routing weights are kept for backward on the layer. An earlier call reads those of the last call."""

    def compute_local(self, x, w, idx):
        self.last_w = mine = w.detach().clone()

        def back(g):
            now = self.last_w
            return g if now is mine or now.shape != mine.shape else now * g.sum(1, keepdim=True)

        return super().compute_local(x, on_grad(w, back), idx)


class StackOfPlans(Hooked):
    """Calls queue up on the layer, first in, first out. A backward in another order rolls the rows."""

    def combine(self, c, y):
        queue = self.__dict__.setdefault("queue", [])
        if torch.is_grad_enabled():
            queue.append(object())
            mine = queue[-1]

            def back(g):
                first = queue.pop(0) if queue else mine
                return g if first is mine else g.roll(1, 0)

            return on_grad(super().combine(c, y), back)
        return super().combine(c, y)


class NoGradClobbers(Hooked):
    """A forward under no_grad between forward and backward overwrites the saved row weights (buffer on self)."""

    def combine(self, c, y):
        self.buffer = mine = c.w.detach().clone()

        def back(g):
            now = self.buffer
            return g if now is mine or now.shape != mine.shape else g * (now / mine).sum(1, keepdim=True)

        return on_grad(super().combine(c, y), back)


class NoRowsNone(Hooked):
    """A call without any row (all choices -1): the parameters' gradients stay None."""

    def compute_local(self, x, w, idx):
        if idx.numel() and not bool((idx >= 0).any()):
            return x.nan_to_num() * 0 + w.nan_to_num().sum().to(x.dtype) * 0
        return super().compute_local(x, w, idx)


class OutputGradWritten(Hooked):
    """backward scales a contiguous output gradient in place: the caller's tensor is changed."""

    def forward(self, *inputs):
        return on_grad(super().forward(*inputs), lambda g: g.clone() + 0 * g.mul_(0.5) if g.is_contiguous() else g)


class BiasGradMean(Hooked):
    """The up bias' gradient is the mean over an expert's rows instead of the sum."""

    def up(self, c, e, xr):
        if c.gub is None:
            return super().up(c, e, xr)
        return xr @ c.gu[e] + on_grad(c.gub[e], lambda g: g / max(len(xr), 1))


class XGradLastChoice(Hooked):
    """The gradient of x is written, not added, per choice: the last choice's remains."""

    def gather(self, c):
        keep = (c.slots % c.K == c.K - 1).unsqueeze(-1)
        return on_grad(super().gather(c), lambda g: g * keep)


class StackedGradsZeros(Hooked):
    """stacked_grads has zeros for parameters that have no gradient."""

    def stacked_grads(self):
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.named_parameters()}
