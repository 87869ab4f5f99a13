"""Compute what follows from a tile in shared memory: SwiGLU, or the gradients of SwiGLU.

The functions are the work of the finishing warps of `experts.gemm.hopper.finished`. A tile has panels of 64 columns,
and a panel has parts of 8 rows. A finishing thread has 8 columns of a part, 16 bytes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from experts.gemm.hopper.gate import glu, glu_backward, sigmoid
from experts.gemm.hopper.loading import read_tile
from experts.gemm.tiling import LARGE

PANEL = 64  # columns of a tile whose rows lie one after another in shared memory
FINISHING_WARPS = 2
PART = 4 * FINISHING_WARPS  # rows of a panel that the finishing warps compute at the same time
PARTS = LARGE.rows // PART

_ROWS, _COLUMNS = gl.constexpr(LARGE.rows), gl.constexpr(LARGE.columns)
_PANEL, _PART, _PARTS, _WARPS = (gl.constexpr(size) for size in (PANEL, PART, PARTS, FINISHING_WARPS))
_PART_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [FINISHING_WARPS, 1], [1, 0]))
#: The layout of a part as pairs of columns.
_PAIRS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [FINISHING_WARPS, 1], [1, 0]))


@gluon.jit
def _load_weights(weights, row_to_slot, first_row, end, of_rows):
    """Copy the routing weights of a tile's rows to shared memory, because each part of the tile needs its rows'."""
    rows = gl.arange(0, _ROWS, layout=gl.BlockedLayout([1], [32], [_WARPS], [0]))
    valid = rows < end - first_row
    slot = gl.load(row_to_slot + first_row + rows, mask=valid, other=0)
    whole = of_rows._reinterpret(gl.float32, [_ROWS], of_rows.layout)
    whole.store(gl.load(weights + slot, mask=valid, other=0.0).to(gl.float32))


@gluon.jit
def _as_parts(result):
    """Return the tile in shared memory as parts: those of the first panel from top to bottom, then the next panel's."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_PART, _PANEL], result.dtype)
    return result._reinterpret(result.dtype, [_COLUMNS // _PANEL * _PARTS, _PART, _PANEL], LAYOUT)


@gluon.jit
def activate(h, out, weights, row_to_slot, tiles, result, of_rows, full, taken, INTER: gl.constexpr):
    """Store h, and the activation of it. A panel of gate is followed by the panel of up of the same columns."""
    rows = gl.arange(0, _PART, layout=gl.SliceLayout(1, _PART_LAYOUT))
    columns = gl.arange(0, _PANEL, layout=gl.SliceLayout(0, _PART_LAYOUT))
    parts = _as_parts(result)
    phase = 0
    for tile in range(gl.program_id(0), gl.load(tiles), gl.num_programs(0)):
        _, column_tile, first_row, end = read_tile(tiles, tile)
        if weights is not None:
            _load_weights(weights, row_to_slot, first_row, end, of_rows)
        mbarrier.wait(full, phase)
        for number in range(_COLUMNS // (2 * _PANEL) * _PARTS):
            pair, part = number // _PARTS, number % _PARTS
            row = first_row + part * _PART + rows
            column = column_tile * (_COLUMNS // 2) + pair * _PANEL + columns
            inside = (row < end)[:, None] & (column < INTER)[None, :]
            gate = parts.index(2 * pair * _PARTS + part).load(_PART_LAYOUT)
            up = parts.index((2 * pair + 1) * _PARTS + part).load(_PART_LAYOUT)
            to_h = h + row.to(gl.int64)[:, None] * (2 * INTER) + column[None, :]
            gl.store(to_h, gate, mask=inside)
            gl.store(to_h + INTER, up, mask=inside)
            value = glu(gate.to(gl.float32), up.to(gl.float32), 1.0, 0.0, 0.0, False)
            if weights is not None:
                value *= of_rows.index(part).load(gl.SliceLayout(1, _PART_LAYOUT))[:, None]
            gl.store(out + row.to(gl.int64)[:, None] * INTER + column[None, :], value.to(result.dtype), mask=inside)
        mbarrier.arrive(taken)
        phase ^= 1


@gluon.jit
def _load_pairs(h_pairs, row, end, column, inside, INTER: gl.constexpr):
    """Load gate and up of a part, two columns in each element; zeros outside of the group or of the columns."""
    where = h_pairs + row.to(gl.int64)[:, None] * INTER + column[None, :]
    inside = (row < end)[:, None] & (inside & (column < INTER // 2))[None, :]
    return gl.load(where, mask=inside, other=0), gl.load(where + INTER // 2, mask=inside, other=0)


@gluon.jit
def _split(pairs, dtype: gl.constexpr):
    """Return the columns of pairs in float32."""
    SUFFIX: gl.constexpr = "bf16" if dtype == gl.bfloat16 else "f16"
    ASM: gl.constexpr = (
        "{ .reg .b16 left, right; mov.b32 {left, right}, $2; cvt.f32."
        + SUFFIX
        + " $0, left; cvt.f32."
        + SUFFIX
        + " $1, right; }"
    )
    left, right = gl.inline_asm_elementwise(
        ASM, "=f,=f,r", [pairs], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )
    return gl.convert_layout(gl.reshape(gl.join(left, right), [_PART, _PANEL]), _PART_LAYOUT, assert_trivial=True)


@gluon.jit
def _store_panel(h, out, grads, gate, up, weight, row, end, column, INTER: gl.constexpr):
    """Store the gradient of h and the weighted activation of a part; return the rows' sums over the panel."""
    dtype: gl.constexpr = out.dtype.element_ty
    grad = grads.load(_PART_LAYOUT).to(gl.float32)
    gate = _split(gate, dtype)
    value, by_gate, by_up = glu_backward(gate, _split(up, dtype), sigmoid(gate))
    sums = gl.sum(grad * value, axis=1)
    grad *= weight[:, None]
    inside = (row < end)[:, None] & (column < INTER)[None, :]
    gl.store(
        out + row.to(gl.int64)[:, None] * INTER + column[None, :], (value * weight[:, None]).to(dtype), mask=inside
    )
    to_h = h + row.to(gl.int64)[:, None] * (2 * INTER) + column[None, :]
    gl.store(to_h, (grad * by_gate).to(dtype), mask=inside)
    gl.store(to_h + INTER, (grad * by_up).to(dtype), mask=inside)
    return sums


@gluon.jit
def activate_back(
    h, h_pairs, out, sums, weights, row_to_slot, tiles, num_rows, result, full, taken, INTER: gl.constexpr
):
    """Overwrite h with its gradient, and store the weighted activation and a row's sums over each tile's columns.

    What the next part needs is loaded before the work on a part. h is loaded in pairs of columns, because registers of
    16 bits that pass from part to part would be moved, and a move waits for the load.
    """
    rows = gl.arange(0, _PART, layout=gl.SliceLayout(1, _PART_LAYOUT))
    columns = gl.arange(0, _PANEL, layout=gl.SliceLayout(0, _PART_LAYOUT))
    pair_rows = gl.arange(0, _PART, layout=gl.SliceLayout(1, _PAIRS_LAYOUT))
    pair_columns = gl.arange(0, _PANEL // 2, layout=gl.SliceLayout(0, _PAIRS_LAYOUT))
    parts = _as_parts(result)
    phase = 0
    for tile in range(gl.program_id(0), gl.load(tiles), gl.num_programs(0)):
        _, column_tile, first_row, end = read_tile(tiles, tile)
        pair_column = column_tile * (_COLUMNS // 2) + pair_columns
        row, pair_row = first_row + rows, first_row + pair_rows
        gate_0, up_0 = _load_pairs(h_pairs, pair_row, end, pair_column, True, INTER)
        gate_1, up_1 = _load_pairs(h_pairs, pair_row, end, pair_column + _PANEL // 2, True, INTER)
        gate_2, up_2 = _load_pairs(h_pairs, pair_row, end, pair_column + _PANEL, True, INTER)
        gate_3, up_3 = _load_pairs(h_pairs, pair_row, end, pair_column + 3 * _PANEL // 2, True, INTER)
        slot = gl.load(row_to_slot + row, mask=row < end, other=0)
        weight = gl.load(weights + slot, mask=row < end, other=0.0)
        slot = gl.load(row_to_slot + row + _PART, mask=row + _PART < end, other=0)
        mbarrier.wait(full, phase)
        for part in range(_PARTS):
            more = part + 1 < _PARTS
            column = column_tile * _COLUMNS + columns
            next_row = pair_row + _PART
            next_weight = gl.load(weights + slot, mask=row + _PART < end, other=0.0)
            slot = gl.load(row_to_slot + row + 2 * _PART, mask=row + 2 * _PART < end, other=0)
            scale = weight.to(gl.float32)
            by_weight = _store_panel(h, out, parts.index(part), gate_0, up_0, scale, row, end, column, INTER)
            gate_0, up_0 = _load_pairs(h_pairs, next_row, end, pair_column, more, INTER)
            column += _PANEL
            grads = parts.index(_PARTS + part)
            by_weight += _store_panel(h, out, grads, gate_1, up_1, scale, row, end, column, INTER)
            gate_1, up_1 = _load_pairs(h_pairs, next_row, end, pair_column + _PANEL // 2, more, INTER)
            column += _PANEL
            grads = parts.index(2 * _PARTS + part)
            by_weight += _store_panel(h, out, grads, gate_2, up_2, scale, row, end, column, INTER)
            gate_2, up_2 = _load_pairs(h_pairs, next_row, end, pair_column + _PANEL, more, INTER)
            column += _PANEL
            grads = parts.index(3 * _PARTS + part)
            by_weight += _store_panel(h, out, grads, gate_3, up_3, scale, row, end, column, INTER)
            gate_3, up_3 = _load_pairs(h_pairs, next_row, end, pair_column + 3 * _PANEL // 2, more, INTER)
            gl.store(sums + column_tile.to(gl.int64) * num_rows + row, by_weight, mask=row < end)
            weight, row, pair_row = next_weight, row + _PART, next_row
        mbarrier.arrive(taken)
        phase ^= 1
