"""Provide backends with a fault in a mode, under a hook, or in one call of many; see faulty and hooked."""

import random

import torch
from hooked import Hooked, on_grad
from torch.autograd import Function


class EvalNoBias(Hooked):
    """In eval mode the down bias is left out (fused inference kernel)."""

    def finish(self, c, e, y, wr):
        if not self.training and c.db is not None:
            y = y - c.db[e].to(c.acc) * (1 if c.after else wr.unsqueeze(-1))
        return super().finish(c, e, y, wr)


class EvalNoGrad(Hooked):
    """In eval mode the result has no graph, although gradients are enabled."""

    def forward(self, *inputs):
        y = super().forward(*inputs)
        return y if self.training else y.detach().requires_grad_()


class EvalThenTrain(Hooked):
    """Once called in eval mode, the biases get no gradient (zero) in training."""

    seen = False

    def cast(self, c):
        self.seen = self.seen or not self.training
        p = super().cast(c)
        return [q if n < 2 or q is None or not self.seen else on_grad(q, torch.zeros_like) for n, q in enumerate(p)]


class NoGradNoLimit(Hooked):
    """Without gradients, swiglu's limit is left out."""

    def glu(self, g, u):
        if self.config.expert_activation == "swiglu" and not torch.is_grad_enabled():
            return torch.nn.functional.silu(g) * u
        return super().glu(g, u)


class NoGradMinusOne(Hooked):
    """Without gradients, a choice of -1 runs expert 0."""

    def plan(self, c):
        if not torch.is_grad_enabled():
            live = (c.idx >= 0).any(1, keepdim=True)
            c.idx = torch.where((c.idx < 0) & live, 0, c.idx)
        return super().plan(c)


class InferenceTopOne(Hooked):
    """In inference mode only the larger weight's choice of each token is computed."""

    def plan(self, c):
        if torch.is_inference_mode_enabled() and c.K > 1:
            keep = torch.nn.functional.one_hot(c.w.argmax(1), c.K).bool()
            c.idx = c.idx.masked_fill(~keep, -1)
        return super().plan(c)


class FrozenModelPath(Hooked):
    """With gradients enabled but nothing that wants one, the last expert is skipped (inference path's off by one)."""

    def plan(self, c):
        wants = c.x.requires_grad or c.w.requires_grad or any(p.requires_grad for p in self.parameters())
        if torch.is_grad_enabled() and not wants:
            c.idx = c.idx.masked_fill(c.idx == self.n_routed_experts - 1, -1)
        return super().plan(c)


class AutocastWeights(Hooked):
    """Under autocast the routing weights are rounded to bfloat16 and lose their gradient."""

    def forward(self, x, token_mask, weights, indices):
        if torch.is_autocast_enabled(x.device.type):
            weights = on_grad(weights.bfloat16().to(weights.dtype), torch.zeros_like)
        return super().forward(x, token_mask, weights, indices)


class _FilledLater(Function):
    """Saves a buffer and fills it afterwards: a hook that copies what is saved sees it empty."""

    @staticmethod
    def forward(ctx, a, p):
        buffer = torch.zeros_like(a)
        ctx.save_for_backward(buffer, p)
        y = a @ p
        ctx.later = buffer
        return y

    @staticmethod
    def backward(ctx, grad):
        a, p = ctx.saved_tensors
        return grad @ p.t(), a.t() @ grad


class SavedThenFilled(Hooked):
    """A buffer is saved for backward and filled after that, so that hooks that copy it save zeros."""

    def down(self, c, e, a):
        y = _FilledLater.apply(a, c.dn[e])
        node = y.grad_fn
        if node is not None:
            node.later.data.copy_(a.detach())
        return y.to(c.acc)


class CheckpointQueue(Hooked):
    """Calls are counted in forward and in backward to pair them. Recomputation breaks the pairs."""

    forwards = backwards = 0

    def cast(self, c):
        p = super().cast(c)
        self.forwards += 1
        mine = self.forwards

        def back(g):
            self.backwards += 1
            return g if self.backwards == mine else torch.zeros_like(g)

        return [p[0], on_grad(p[1], back), *p[2:]]


class CheckpointMicrobatch(Hooked):
    """A forward while another's backward runs (recomputation) takes the routing weights for 1 in the activation."""

    busy = False

    def forward(self, *inputs):
        inside = torch._C._current_graph_task_id() != -1
        self.busy = inside
        y = super().forward(*inputs)
        self.busy = False
        return y

    def row_weights(self, c):
        w = super().row_weights(c)
        return on_grad(torch.ones_like(w) + 0 * w, lambda g: g) if self.busy else w


class Nth(Hooked):
    """Right; every n-th call is marked."""

    n = 5
    count = 0

    def compute_local(self, x, w, idx):
        self.count += 1
        self.now = self.hit()
        return super().compute_local(x, w, idx)

    def hit(self):
        return self.count % self.n == 0


class TwentiethBackward(Nth):
    """In every 20th call the up projection's gradient is doubled. The forward pass is right."""

    n = 20

    def cast(self, c):
        p = super().cast(c)
        return [on_grad(p[0], lambda g: 2 * g), *p[1:]] if self.now else p


class Race(Hooked):
    """Right; one in `n` calls (own random generator) is marked."""

    n = 10

    def __init__(self, config):
        super().__init__(config)
        self.rng = random.Random(4)

    def compute_local(self, x, w, idx):
        self.now = self.rng.randrange(self.n) == 0
        return super().compute_local(x, w, idx)


class RaceTenBackward(Race):
    """One in ten calls (at random) loses one row in the gradient of x. The forward pass is right."""

    def gather(self, c):
        rows = super().gather(c)
        if not self.now or not len(rows):
            return rows
        lost = self.rng.randrange(len(rows))
        return on_grad(rows, lambda g: g * (torch.arange(len(g)) != lost).unsqueeze(-1))


class RaceFiftyForward(Race):
    """One in fifty calls (at random) adds one row twice."""

    n = 50

    def combine(self, c, y):
        if self.now and len(y):
            twice = torch.ones(len(y), 1, dtype=y.dtype)
            twice[self.rng.randrange(len(y))] = 2
            y = y * twice
        return super().combine(c, y)


class RaceFiftyBiasGrad(Race):
    """With bias: one in fifty calls (at random) loses one expert's down bias gradient."""

    n = 50

    def cast(self, c):
        p = super().cast(c)
        if not self.now or p[3] is None:
            return p
        lost = self.rng.randrange(c.E)
        return [*p[:3], on_grad(p[3], lambda g: g * (torch.arange(c.E) != lost).unsqueeze(1))]


class NondeterministicAtomics(Hooked):
    """Only without torch.use_deterministic_algorithms: top-k > 1 counts each token's first choice 2% too much."""

    def combine(self, c, y):
        if torch.are_deterministic_algorithms_enabled() or c.T == 0 or c.K == 1:
            return super().combine(c, y)
        out = super().combine(c, y)
        return out + 0.02 * super().combine(c, y * (c.slots % c.K == 0).unsqueeze(-1))


class UninitialisedOutput(Hooked):
    """Tokens without any row are never written: uninitialised memory (NaN where the allocator is poisoned)."""

    def combine(self, c, y):
        out = super().combine(c, y)
        empty = torch.empty(out.shape, dtype=out.dtype)
        written = torch.zeros(c.T, dtype=torch.bool).index_fill(0, c.tokens, True)
        return torch.where(written.unsqueeze(-1), out, empty)


class UninitialisedGrad(Hooked):
    """Experts without rows: the up projection's gradient is uninitialised memory."""

    def cast(self, c):
        p = super().cast(c)
        counts = torch.bincount(self.local(c), minlength=c.E + 1)[: c.E]
        full = (counts > 0).view(-1, 1, 1)
        return [on_grad(p[0], lambda g: torch.where(full, g, torch.empty_like(g))), *p[1:]]
