"""Multiply the rows of tokens, and compute what follows from each tile: SwiGLU, or the gradients of SwiGLU.

Four warps load and eight multiply, as in `experts.gemm.hopper.rows`. The eight leave each tile in shared memory, and
four more warps compute from it while the next tile is multiplied. So the tensor cores do not wait for the activation,
and no kernel of its own reads the rows again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from experts.gemm.hopper.descriptors import aligned, described
from experts.gemm.hopper.gate import glu, glu_backward
from experts.gemm.hopper.loading import load_tokens, read_tile
from experts.gemm.hopper.rows import multiply_step
from experts.gemm.tiling import LARGE, PAIRS
from experts.steps import Permutation
from experts.steps.fused.launch import launch

PANEL = 64  # columns of a tile whose rows lie one after another in shared memory
PART = 8  # rows of a panel that the finishing warps compute at the same time
LOADING_WARPS, FINISHING_WARPS, REGISTERS = 2, 2, 104
_ROWS_AT_ONCE = 1024


def kept_and_activated(
    x_TD: Tensor, b_LDH: Tensor, permutation: Permutation, tiles: Tensor, programs: int, weights_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return h [N, H], each row's token times its expert's matrix, and [N, I], silu(gate)·up of h times the weight.

    x: [T, D]; b: [L, D, H], whose columns are those of gate, then those of up; weights: [T, K] or None; H = 2I. The
    tiles are those of `experts.gemm.products`, of `PAIRS`. Rows past the last group stay unwritten.
    """
    x_TD, b_LDH = aligned(x_TD), aligned(b_LDH)
    experts, depth, width = b_LDH.shape
    h_NH = torch.empty(permutation.num_rows, width, dtype=x_TD.dtype, device=x_TD.device)
    a_NI = torch.empty(permutation.num_rows, width // 2, dtype=x_TD.dtype, device=x_TD.device)
    pairs = described(b_LDH.view(experts, depth, 2, width // 2).transpose(1, 2), [1, 2, PAIRS.depth, PAIRS.columns])
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    _launch(x_TD, pairs, h_NH, a_NI, None, weights_TK, permutation, tiles, programs, depth, back=False)
    return h_NH, a_NI


def activated_back(
    grad_TD: Tensor,
    b_LID: Tensor,
    h_NH: Tensor,
    permutation: Permutation,
    tiles: Tensor,
    programs: int,
    weights_TK: Tensor,
) -> tuple[Tensor, Tensor]:
    """Overwrite h with its gradient, and return silu(gate)·up of h times the weight [N, I] and the weights' gradient.

    The gradient of the weighted activation is each row's token of `grad_TD` times the transpose of its expert's matrix
    of b [L, I, D]. It is rounded to the dtype of b, and not stored. h: [N, 2I], contiguous, with a start that is a
    multiple of 16 bytes. The weights' gradient [T, K] is in float32. The tiles are those of `LARGE`.
    """
    grad_TD, b_LID = aligned(grad_TD), aligned(b_LID)
    _, inter, depth = b_LID.shape
    num_rows = permutation.num_rows
    a_NI = torch.empty(num_rows, inter, dtype=h_NH.dtype, device=h_NH.device)
    num_tiles = triton.cdiv(inter, LARGE.columns)
    sums_CN = torch.empty(num_tiles, num_rows, dtype=torch.float32, device=h_NH.device)
    matrices = described(b_LID, [1, LARGE.columns, LARGE.depth])
    weights_TK = weights_TK.contiguous()
    _launch(grad_TD, matrices, h_NH, a_NI, sums_CN, weights_TK, permutation, tiles, programs, depth, back=True)
    grad_weights_TK = torch.zeros(weights_TK.shape, dtype=torch.float32, device=h_NH.device)
    launch(
        add_sums,
        (triton.cdiv(num_rows, _ROWS_AT_ONCE),),
        *(sums_CN, grad_weights_TK, permutation.row_to_slot_N, permutation.offsets_L[-1:], num_rows),
        TILES=num_tiles,
        ROWS=_ROWS_AT_ONCE,
    )
    return a_NI, grad_weights_TK


def _launch(
    x: Tensor,
    b: object,
    h_NH: Tensor,
    a_NI: Tensor,
    sums_CN: Tensor | None,
    weights_TK: Tensor | None,
    permutation: Permutation,
    tiles: Tensor,
    programs: int,
    depth: int,
    back: bool,
) -> None:
    launch(
        multiply_and_finish,
        (programs,),
        *(
            x,
            b,
            h_NH,
            h_NH.view(torch.int32),
            a_NI,
            sums_CN,
            weights_TK,
            permutation.row_to_slot_N,
            tiles,
            permutation.num_rows,
        ),
        DEPTH=depth,
        INTER=a_NI.shape[1],
        K=permutation.n_activated_experts,
        BACK=back,
        num_warps=LARGE.warps,
    )


_ROWS, _COLUMNS = gl.constexpr(LARGE.rows), gl.constexpr(LARGE.columns)
_STEP, _STAGES = gl.constexpr(LARGE.depth), gl.constexpr(LARGE.stages)
_PANEL, _PART, _PARTS = gl.constexpr(PANEL), gl.constexpr(PART), gl.constexpr(LARGE.rows // PART)
_LOADING, _WARPS, _REGISTERS = gl.constexpr(LOADING_WARPS), gl.constexpr(FINISHING_WARPS), gl.constexpr(REGISTERS)


@triton.jit
def add_sums(sums, grad_weights, row_to_slot, num_local, num_rows, TILES: tl.constexpr, ROWS: tl.constexpr):
    """Add up a row's sums over the tiles of columns, and store them as the gradient of the row's routing weight."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < tl.load(num_local)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for _ in range(TILES):
        total += tl.load(sums + row, mask=valid, other=0.0)
        sums += num_rows
    tl.store(grad_weights + tl.load(row_to_slot + row, mask=valid, other=0), total, mask=valid)


@gluon.jit
def _multiply(
    a_tiles,
    b_tiles,
    result,
    tiles,
    loaded,
    free,
    full,
    taken,
    DEPTH: gl.constexpr,
    BACK: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, _COLUMNS, 16])
    RESULT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _COLUMNS], result.dtype)
    whole = result._reinterpret(result.dtype, [_ROWS, _COLUMNS], RESULT)
    step, phase = 0, 0
    for _ in range(gl.program_id(0), gl.load(tiles), gl.num_programs(0)):
        sums = gl.zeros([_ROWS, _COLUMNS], gl.float32, layout)
        sums = multiply_step(sums, step, a_tiles, b_tiles, loaded, True, BACK, True)
        step += 1
        for _ in range(_STEP, DEPTH, _STEP):
            sums = multiply_step(sums, step, a_tiles, b_tiles, loaded, True, BACK, False)
            mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
            step += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
        mbarrier.wait(taken, phase ^ 1)  # the finishing warps have read the tile before
        whole.store(sums.to(result.dtype))
        mbarrier.arrive(full)
        phase ^= 1


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
def _activate(h, out, weights, row_to_slot, tiles, result, of_rows, full, taken, INTER: gl.constexpr):
    """Store h, and the activation of it. A panel of gate is followed by the panel of up of the same columns."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // _PANEL, _PANEL // 8], [_WARPS, 1], [1, 0])
    rows = gl.arange(0, _PART, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, _PANEL, layout=gl.SliceLayout(0, layout))
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
            gate = parts.index(2 * pair * _PARTS + part).load(layout)
            up = parts.index((2 * pair + 1) * _PARTS + part).load(layout)
            to_h = h + row.to(gl.int64)[:, None] * (2 * INTER) + column[None, :]
            gl.store(to_h, gate, mask=inside)
            gl.store(to_h + INTER, up, mask=inside)
            value = glu(gate.to(gl.float32), up.to(gl.float32), 1.0, 0.0, 0.0, False)
            if weights is not None:
                value *= of_rows.index(part).load(gl.SliceLayout(1, layout))[:, None]
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
def _split(pairs, layout: gl.constexpr, dtype: gl.constexpr):
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
    return gl.convert_layout(gl.reshape(gl.join(left, right), [_PART, _PANEL]), layout, assert_trivial=True)


@gluon.jit
def _store_panel(h, out, grads, gate, up, weight, row, end, column, INTER: gl.constexpr):
    """Store the gradient of h and the weighted activation of a part; return the rows' sums over the panel."""
    dtype: gl.constexpr = out.dtype.element_ty
    layout: gl.constexpr = _back_layout()
    grad = grads.load(layout).to(gl.float32)
    value, by_gate, by_up = glu_backward(_split(gate, layout, dtype), _split(up, layout, dtype))
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


@gluon.constexpr_function
def _back_layout():
    return gl.BlockedLayout([1, 8], [256 // PANEL, PANEL // 8], [FINISHING_WARPS, 1], [1, 0])


@gluon.constexpr_function
def _pairs_layout():
    return gl.BlockedLayout([1, 4], [256 // PANEL, PANEL // 8], [FINISHING_WARPS, 1], [1, 0])


@gluon.jit
def _activate_back(
    h, h_pairs, out, sums, weights, row_to_slot, tiles, num_rows, result, full, taken, INTER: gl.constexpr
):
    """Overwrite h with its gradient, and store the weighted activation and a row's sums over each tile's columns.

    What the next part needs is loaded before the work on a part. h is loaded in pairs of columns, because registers of
    16 bits that pass from part to part would be moved, and a move waits for the load.
    """
    layout: gl.constexpr = _back_layout()
    pairs_layout: gl.constexpr = _pairs_layout()
    rows = gl.arange(0, _PART, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, _PANEL, layout=gl.SliceLayout(0, layout))
    pair_rows = gl.arange(0, _PART, layout=gl.SliceLayout(1, pairs_layout))
    pair_columns = gl.arange(0, _PANEL // 2, layout=gl.SliceLayout(0, pairs_layout))
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


@gluon.jit
def multiply_and_finish(
    x,
    b,
    h,
    h_pairs,
    out,
    sums,
    weights,
    row_to_slot,
    tiles,
    num_rows,
    DEPTH: gl.constexpr,
    INTER: gl.constexpr,
    K: gl.constexpr,
    BACK: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = b.dtype
    A_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _STEP], dtype)
    a_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _ROWS, _STEP], A_LAYOUT)
    if BACK:
        TURNED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_COLUMNS, _STEP], dtype)
        b_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _COLUMNS, _STEP], TURNED)
    else:
        STRAIGHT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_STEP, _COLUMNS], dtype)
        b_tiles = gl.allocate_shared_memory(dtype, [_STAGES, _STEP, _COLUMNS], STRAIGHT)
    PANELS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _PANEL], dtype)
    result = gl.allocate_shared_memory(dtype, [_COLUMNS // _PANEL, _ROWS, _PANEL], PANELS)
    of_rows = gl.allocate_shared_memory(gl.float32, [_PARTS, _PART], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    loaded = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(loaded.index(stage), count=1 + 32 * _LOADING)  # the TMA, and each thread that gathers
        mbarrier.init(free.index(stage), count=1)
    mbarrier.init(full, count=1)
    mbarrier.init(taken, count=1)
    fence_async_shared()
    # twice, because Gluon loses the constants of a tuple that has a name
    if BACK:
        gl.warp_specialize(
            [
                (_multiply, (a_tiles, b_tiles, result, tiles, loaded, free, full, taken, DEPTH, BACK, num_warps)),
                (
                    load_tokens,
                    (x, b, row_to_slot, tiles, a_tiles, b_tiles, loaded, free, DEPTH, K, True, False, _LOADING),
                ),
                (
                    _activate_back,
                    (h, h_pairs, out, sums, weights, row_to_slot, tiles, num_rows, result, full, taken, INTER),
                ),
            ],
            [_LOADING, _WARPS],
            [_REGISTERS, _REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (a_tiles, b_tiles, result, tiles, loaded, free, full, taken, DEPTH, BACK, num_warps)),
                (
                    load_tokens,
                    (x, b, row_to_slot, tiles, a_tiles, b_tiles, loaded, free, DEPTH, K, False, True, _LOADING),
                ),
                (_activate, (h, out, weights, row_to_slot, tiles, result, of_rows, full, taken, INTER)),
            ],
            [_LOADING, _WARPS],
            [_REGISTERS, _REGISTERS],
        )
