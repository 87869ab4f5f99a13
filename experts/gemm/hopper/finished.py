"""Multiply rows, and compute what follows from each tile: SwiGLU, or the gradients of SwiGLU.

Two warps gather the rows of tokens, or one warp loads rows in permuted order. Eight warps multiply, as in
`experts.gemm.hopper.rows`. The eight leave each tile in shared memory, and two more warps compute from it while the
next tile is multiplied (`experts.gemm.hopper.finishing`). So the tensor cores do not wait for the activation, and no
kernel of its own reads the rows again. More than twelve warps would leave too few registers for tiles of 256 columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from experts.gemm.hopper.descriptors import aligned, described
from experts.gemm.hopper.finishing import FINISHING_WARPS, PANEL, PART, PARTS, activate, activate_back
from experts.gemm.hopper.loading import load_rows, load_tokens
from experts.gemm.hopper.rows import multiply_step
from experts.gemm.tiling import LARGE, PAIRS
from experts.steps import Permutation
from experts.steps.fused.launch import launch

LOADING_WARPS = 2
REGISTERS = 104  # of a thread that loads or finishes
_ROWS_AT_ONCE = 1024


def kept_and_activated(
    x: Tensor,
    b_LDH: Tensor,
    permutation: Permutation,
    tiles: Tensor,
    programs: int,
    weights_TK: Tensor | None,
    gather: bool,
) -> tuple[Tensor, Tensor]:
    """Return h [N, H], each row times its expert's matrix, and [N, I], silu(gate)·up of h times the routing weight.

    x: the rows' tokens [T, D] with `gather`, else the rows [N, D]; b: [L, D, H], whose columns are those of gate, then
    those of up; weights: [T, K] or None; H = 2I. The tiles are those of `experts.gemm.products`, of `PAIRS`. Rows past
    the last group stay unwritten.
    """
    x, b_LDH = aligned(x), aligned(b_LDH)
    experts, depth, width = b_LDH.shape
    h_NH = torch.empty(permutation.num_rows, width, dtype=x.dtype, device=x.device)
    a_NI = torch.empty(permutation.num_rows, width // 2, dtype=x.dtype, device=x.device)
    pairs = described(b_LDH.view(experts, depth, 2, width // 2).transpose(1, 2), [1, 2, PAIRS.depth, PAIRS.columns])
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    rows = x if gather else described(x, [LARGE.rows, LARGE.depth])
    _launch(rows, pairs, h_NH, a_NI, None, weights_TK, permutation, tiles, programs, depth, gather, back=False)
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
    gather = True
    _launch(grad_TD, matrices, h_NH, a_NI, sums_CN, weights_TK, permutation, tiles, programs, depth, gather, back=True)
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
    x: object,
    b: object,
    h_NH: Tensor,
    a_NI: Tensor,
    sums_CN: Tensor | None,
    weights_TK: Tensor | None,
    permutation: Permutation,
    tiles: Tensor,
    programs: int,
    depth: int,
    gather: bool,
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
        GATHER=gather,
        BACK=back,
        num_warps=LARGE.warps,
    )


_ROWS, _COLUMNS = gl.constexpr(LARGE.rows), gl.constexpr(LARGE.columns)
_STEP, _STAGES = gl.constexpr(LARGE.depth), gl.constexpr(LARGE.stages)
_PANEL, _PART, _PARTS, _WARPS = (gl.constexpr(size) for size in (PANEL, PART, PARTS, FINISHING_WARPS))
_LOADING, _REGISTERS = gl.constexpr(LOADING_WARPS), gl.constexpr(REGISTERS)


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
    GATHER: gl.constexpr,
    BACK: gl.constexpr,
    WARPS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, _COLUMNS, 16])
    RESULT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, _COLUMNS], result.dtype)
    whole = result._reinterpret(result.dtype, [_ROWS, _COLUMNS], RESULT)
    step, phase = 0, 0
    for _ in range(gl.program_id(0), gl.load(tiles), gl.num_programs(0)):
        sums = gl.zeros([_ROWS, _COLUMNS], gl.float32, layout)
        sums = multiply_step(sums, step, a_tiles, b_tiles, loaded, GATHER, BACK, True)
        step += 1
        for _ in range(_STEP, DEPTH, _STEP):
            sums = multiply_step(sums, step, a_tiles, b_tiles, loaded, GATHER, BACK, False)
            mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
            step += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(free.index((step + _STAGES - 1) % _STAGES))
        mbarrier.wait(taken, phase ^ 1)  # the finishing warps have read the tile before
        whole.store(sums.to(result.dtype))
        mbarrier.arrive(full)
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
    GATHER: gl.constexpr,
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
        # the TMA, and each thread that gathers
        mbarrier.init(loaded.index(stage), count=1 + 32 * _LOADING if GATHER else 1)
        mbarrier.init(free.index(stage), count=1)
    mbarrier.init(full, count=1)
    mbarrier.init(taken, count=1)
    fence_async_shared()
    # several times, because Gluon loses the constants of a tuple that has a name
    if BACK:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (a_tiles, b_tiles, result, tiles, loaded, free, full, taken, DEPTH, GATHER, BACK, num_warps),
                ),
                (
                    load_tokens,
                    (x, b, row_to_slot, tiles, a_tiles, b_tiles, loaded, free, DEPTH, K, True, False, _LOADING),
                ),
                (
                    activate_back,
                    (h, h_pairs, out, sums, weights, row_to_slot, tiles, num_rows, result, full, taken, INTER),
                ),
            ],
            [_LOADING, _WARPS],
            [_REGISTERS, _REGISTERS],
        )
    elif GATHER:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (a_tiles, b_tiles, result, tiles, loaded, free, full, taken, DEPTH, GATHER, BACK, num_warps),
                ),
                (
                    load_tokens,
                    (x, b, row_to_slot, tiles, a_tiles, b_tiles, loaded, free, DEPTH, K, False, True, _LOADING),
                ),
                (activate, (h, out, weights, row_to_slot, tiles, result, of_rows, full, taken, INTER)),
            ],
            [_LOADING, _WARPS],
            [_REGISTERS, _REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (a_tiles, b_tiles, result, tiles, loaded, free, full, taken, DEPTH, GATHER, BACK, num_warps),
                ),
                (load_rows, (x, b, tiles, a_tiles, b_tiles, loaded, free, DEPTH, False, True)),
                (activate, (h, out, weights, row_to_slot, tiles, result, of_rows, full, taken, INTER)),
            ],
            [1, _WARPS],
            [24, _REGISTERS],
        )
