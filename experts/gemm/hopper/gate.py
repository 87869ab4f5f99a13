"""Compute gated activations in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def glu(gate, up, ALPHA: gl.constexpr, LIMIT: gl.constexpr, OFFSET: gl.constexpr, GELU: gl.constexpr):
    """Return the gated activation. NaN passes through the clamps; see `experts.steps.fused.tiles.glu`."""
    if LIMIT > 0:
        gate = gl.where(gate > LIMIT, LIMIT, gate)
        up = gl.where(up > LIMIT, LIMIT, gl.where(up < -LIMIT, -LIMIT, up))
    inside = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else ALPHA * gate
    if OFFSET != 0:
        up += OFFSET
    return gate / (1.0 + gl.exp(-inside)) * up


@gluon.jit
def glu_backward(gate, up):
    """Return silu(gate)·up and its derivatives by gate and up."""
    s = 1.0 / (1.0 + gl.exp(-gate))
    by_up = gate * s
    return by_up * up, up * (s + by_up * (1.0 - s)), by_up
