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
def sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def glu_backward(gate, up, s):
    """Return silu(gate)·up and its derivatives by gate and up. `s` is the sigmoid of gate."""
    by_up = gate * s
    return by_up * up, up * (s + by_up * (1.0 - s)), by_up


@gluon.jit
def glu_of_pairs(sums, WARPS: gl.constexpr):
    """Return silu(gate)·up of sums whose columns are 64 of gate, the same of up, then the next 64 of both."""
    ROWS: gl.constexpr = sums.shape[0]
    COLUMNS: gl.constexpr = sums.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS // 2, 16])
    pairs = gl.permute(gl.reshape(sums, [ROWS, 2, 2, COLUMNS // 4]), (0, 1, 3, 2))
    gate, up = gl.split(pairs)
    gate = gl.convert_layout(gl.reshape(gate, [ROWS, COLUMNS // 2]), layout, assert_trivial=True)
    up = gl.convert_layout(gl.reshape(up, [ROWS, COLUMNS // 2]), layout, assert_trivial=True)
    return glu(gate, up, 1.0, 0.0, 0.0, False)
