"""Share the parts of the activation's kernels: find a program's rows, load and store tiles, and compute the gate."""

import triton
import triton.language as tl


@triton.jit
def find_rows(row_to_slot, row_to_expert, num_local, weights, WEIGHTS: tl.constexpr, ROWS: tl.constexpr):
    """Return this program's rows: their numbers, whether each row is in a group, slots, experts and routing weights."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < tl.load(num_local)
    slot = tl.load(row_to_slot + row, mask=valid, other=0)
    expert = tl.load(row_to_expert + row, mask=valid, other=0)
    weight = tl.full([ROWS], 1.0, dtype=tl.float32)
    if WEIGHTS:
        weight = tl.load(weights + slot, mask=valid, other=0.0).to(tl.float32)
    return row, valid, slot, expert, weight


@triton.jit
def load_tile(source, bias, row, valid, expert, columns, shift, width, stride, BIAS: tl.constexpr):
    """Return a float32 tile of the `width` columns from `shift` on, plus the bias of each row's expert.

    Elements outside of the rows or columns are zero.
    """
    inside = valid[:, None] & (columns < width)[None, :]
    where = shift + columns[None, :]
    tile = tl.load(source + row[:, None] * stride + where, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        tile += tl.load(bias + expert[:, None] * stride + where, mask=inside, other=0.0).to(tl.float32)
    return tile


@triton.jit
def store_tile(target, tile, row, valid, columns, shift, width, stride):
    inside = valid[:, None] & (columns < width)[None, :]
    tl.store(target + row[:, None] * stride + shift + columns[None, :], tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def load_gate_and_up(
    h,
    bias,
    row,
    valid,
    expert,
    start,
    inter: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if INTERLEAVED:
        pairs = 2 * start + tl.arange(0, 2 * COLUMNS)
        both = load_tile(h, bias, row, valid, expert, pairs, 0, 2 * inter, 2 * inter, BIAS)
        gate, up = tl.split(tl.reshape(both, [ROWS, COLUMNS, 2]))
    else:
        columns = start + tl.arange(0, COLUMNS)
        gate = load_tile(h, bias, row, valid, expert, columns, 0, inter, 2 * inter, BIAS)
        up = load_tile(h, bias, row, valid, expert, columns, inter, inter, 2 * inter, BIAS)
    return gate, up


@triton.jit
def glu(gate, up, alpha, limit, offset, GELU: tl.constexpr, LIMITED: tl.constexpr):
    """Return the gated activation and its derivatives by gate and up. NaN passes through the clamps, as in torch."""
    g, u = gate, up
    if LIMITED:
        g = tl.where(gate > limit, limit, gate)
        u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if GELU:
        inside = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        slope = 1.5957691216057308 * (1 + 0.134145 * g * g)
    else:
        inside = alpha * g
        slope = alpha
    s = tl.sigmoid(inside)
    by_gate = (u + offset) * (s + g * s * (1 - s) * slope)
    by_up = g * s
    if LIMITED:
        by_gate = tl.where(gate > limit, 0.0, by_gate)
        by_up = tl.where((up > limit) | (up < -limit), 0.0, by_up)
    return g * s * (u + offset), by_gate, by_up


@triton.jit
def activate_tile(
    h,
    bias,
    row,
    valid,
    expert,
    start,
    alpha,
    limit,
    offset,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GELU: tl.constexpr,
    LIMITED: tl.constexpr,
    BIAS: tl.constexpr,
    INTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the activation of COLUMNS columns from `start` on, and its derivatives by gate and up.

    Without a gate, the first derivative is that by h, and the second is zero.
    """
    if GATED:
        gate, up = load_gate_and_up(h, bias, row, valid, expert, start, INTER, INTERLEAVED, BIAS, ROWS, COLUMNS)
        value, by_gate, by_up = glu(gate, up, alpha, limit, offset, GELU, LIMITED)
    else:
        columns = start + tl.arange(0, COLUMNS)
        x = load_tile(h, bias, row, valid, expert, columns, 0, INTER, INTER, BIAS)
        x = tl.where(x < 0, 0.0, x)
        value, by_gate, by_up = x * x, 2 * x, tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    return value, by_gate, by_up
