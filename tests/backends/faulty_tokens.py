"""Provide backends with a fault in the number of tokens or rows; see faulty and hooked."""

import torch
from hooked import Hooked, on_grad


class ZeroTokensParamsNone(Hooked):
    """Zero tokens: the early return is connected to x only, so the parameters' gradients stay None."""

    def compute_local(self, x, w, idx):
        return super().compute_local(x, w, idx) if x.shape[0] else x * 1


class ZeroTokensDtype(Hooked):
    """Zero tokens: the early return is float32 whatever x's dtype is; trigger bfloat16."""

    def compute_local(self, x, w, idx):
        y = super().compute_local(x, w, idx)
        return y if x.shape[0] else y.float()


class OneTokenChoices(Hooked):
    """One token: the matrix-vector path runs the first two choices only (wrong with top-k > 2)."""

    def plan(self, c):
        if c.T == 1 and c.K > 2:
            c.idx = c.idx.clone()
            c.idx[:, 2:] = -1
        return super().plan(c)


class OneTokenNoBias(Hooked):
    """One token: the matrix-vector path leaves the up projection's bias out."""

    def up(self, c, e, xr):
        return xr @ c.gu[e] + 0 * c.gub[e] if c.T == 1 and c.gub is not None else super().up(c, e, xr)


class OneTokenWeightGrad(Hooked):
    """One token: the routing weights are squeezed to [K] and taken out of the graph; they get a zero gradient."""

    def row_weights(self, c):
        w = super().row_weights(c)
        return on_grad(w, torch.zeros_like) if c.T == 1 else w


class SquareWeightsTransposed(Hooked):
    """As many tokens as choices (T = K > 1): weights are taken for [K, T] and transposed."""

    def compute_local(self, x, w, idx):
        return super().compute_local(x, w.t() if w.shape[0] == w.shape[1] else w, idx)


class TwoTokensSwapped(Hooked):
    """Exactly two tokens: the two output rows come back in exchanged places."""

    def combine(self, c, y):
        out = super().combine(c, y)
        return out.flip(0) if c.T == 2 else out


class ThreeTokensPairs(Hooked):
    """Fewer than four tokens are done in pairs: with 3 tokens the last one stays zero."""

    def combine(self, c, y):
        out = super().combine(c, y)
        return out * (torch.arange(c.T) < 2).unsqueeze(-1) if c.T == 3 else out


class Tile16LastRow(Hooked):
    """An expert with one row more than a multiple of 16 (17, 33, ...): that row is not computed."""

    tile, rest = 16, 1

    def expert(self, c, e, xr, wr):
        y = super().expert(c, e, xr, wr)
        n = y.shape[0]
        if n > self.tile and n % self.tile == self.rest:
            keep = (torch.arange(n) < n - 1).unsqueeze(-1)
            y = y.masked_fill(~keep, 0)
        return y


class Tile16Repeat(Hooked):
    """An expert with one row less than a multiple of 16 (15, 31, ...): its last row repeats the row before."""

    def expert(self, c, e, xr, wr):
        n = xr.shape[0]
        if n % 16 == 15:
            order = torch.arange(n)
            order[-1] = n - 2
            xr = xr[order]
        return super().expert(c, e, xr, wr)


class Tile32Tokens(Hooked):
    """33, 65, 97 ... tokens: the last token's row of the output stays zero (grid rounded down)."""

    def combine(self, c, y):
        out = super().combine(c, y)
        if c.T > 32 and c.T % 32 == 1:
            out = out * (torch.arange(c.T) < c.T - 1).unsqueeze(-1)
        return out


class Tile32InputGrad(Hooked):
    """31, 63, 95, … tokens: the gradient of the last token counts twice. The forward pass is right."""

    def gather(self, c):
        if c.T % 32 == 31:
            c.x = on_grad(c.x, lambda g: torch.cat([g[:-1], 2 * g[-1:]]))
        return super().gather(c)


class Tile64WeightGrad(Hooked):
    """An expert with 63 rows modulo 64: the up projection's gradient misses the last row."""

    def up(self, c, e, xr):
        if xr.shape[0] % 64 == 63:
            first, last = xr[:-1] @ c.gu[e], xr[-1:] @ c.gu[e].detach()
            h = torch.cat([first, last])
            return h if c.gub is None else h + c.gub[e]
        return super().up(c, e, xr)


class Tile128FirstToken(Hooked):
    """Exactly 127 tokens (modulo 128): token 0's routing weights are read as those of token 1."""

    def compute_local(self, x, w, idx):
        if x.shape[0] % 128 == 127:
            w = torch.cat([w[1:2], w[1:]])
        return super().compute_local(x, w, idx)


class Tile128Expert(Hooked):
    """129 rows modulo 128 in total: the last sorted row is computed with the expert before the last used one."""

    def plan(self, c):
        slots, counts = super().plan(c)
        used = [e for e, n in enumerate(counts) if n]
        if len(slots) > 128 and len(slots) % 128 == 1 and len(used) > 1:
            counts[used[-1]] -= 1
            counts[used[-2]] += 1
            last = slots.shape[0] - counts[used[-1]] - 1
            slots = torch.cat([slots[:last], slots[-1:], slots[last:-1]])
        return slots, counts


class Rows65536Wrap(Hooked):
    """More than 65,536 rows (T·K): the row number is kept in 16 bits, so later rows read the first tokens again."""

    def gather(self, c):
        return c.x.to(c.acc)[(c.slots & 0xFFFF) // c.K].to(c.x.dtype)


class Rows65536Grad(Hooked):
    """More than 65,536 rows: the gradient of the down projection sums the rows of slots below 65,536 only."""

    def down(self, c, e, a):
        start = sum(c.counts[:e])
        low = (c.slots[start : start + a.shape[0]] < 65536).unsqueeze(-1)
        if bool(low.all()):
            return super().down(c, e, a)
        return torch.where(low, a @ c.dn[e], a @ c.dn[e].detach()).to(c.acc)


class Tokens65535(Hooked):
    """More than 65,535 tokens (the y grid's limit): the tokens past it get zeros."""

    def combine(self, c, y):
        out = super().combine(c, y)
        return out * (torch.arange(c.T) < 65535).unsqueeze(-1) if c.T > 65535 else out


class Count16Bit(Hooked):
    """An expert with more than 32,767 rows: the count is an int16, its rows past that are dropped."""

    def expert(self, c, e, xr, wr):
        y = super().expert(c, e, xr, wr)
        return y if y.shape[0] < 32768 else torch.cat([y[:32767], torch.zeros_like(y[32767:])])


class GrowWorkspace(Hooked):
    """The workspace has the rows of the first call: in a call with more tokens, the tokens past it get zeros."""

    room = 0

    def combine(self, c, y):
        out = super().combine(c, y)
        self.room = self.room or c.T
        return out if self.room >= c.T else out * (torch.arange(c.T) < self.room).unsqueeze(-1)


class ShrinkBiasGrad(Hooked):
    """After a larger call, a smaller one adds the stale rows of the workspace to the down bias' gradient."""

    rows = None

    def expert(self, c, e, xr, wr):
        if e == 0 and c.db is not None:
            stale = self.rows
            self.rows = c.x.detach().clone()
            if stale is not None and stale.shape[0] > c.T:
                extra = stale[c.T :].sum(0)
                c.db = [on_grad(c.db[0], lambda g: g + extra.to(g.dtype)), *c.db[1:]]
        return super().expert(c, e, xr, wr)


class CapacityTwice(Hooked):
    """Rows past twice an expert's fair share are dropped (a capacity factor of 2)."""

    def expert(self, c, e, xr, wr):
        y = super().expert(c, e, xr, wr)
        room = -(-2 * c.T * c.K // c.E)
        return y if len(y) <= room else y * (torch.arange(len(y)) < room).unsqueeze(-1)
