"""Compute the local experts of few tokens, without gradients, in two kernels. Nothing sorts the choices before them.

With few tokens, a layer takes hardly longer than it takes to read the weights, so each kernel more counts. The first
kernel multiplies by `gate_and_up_projs` and activates. The second multiplies by `down_projs` and sums. Both have one
program for each choice and block of columns. A program reads the experts of all choices. The program of the first
choice of an expert multiplies the tokens of up to ROWS of the expert's choices, and the programs of the others end at
once.

In the second kernel, the program that is the last to finish a block of a token's columns adds up the products of the
token's choices. It adds them in the order of the choices, so every run gives the same bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.activations import activation_form
from experts.compute import ExpertParameters
from experts.config import MoEConfig
from experts.gemm.kernels import load_weights
from experts.gemm.products import described
from experts.steps.fused.launch import launch
from experts.steps.fused.tiles import glu

#: The most choices (num_tokens · n_activated_experts), and the most for each routed expert. With more, the kernels for
#: sorted rows were as fast or faster on an H200 (2026-11-30).
MAX_CHOICES = 32
MAX_CHOICES_PER_EXPERT = 0.25
#: The fewest rows that tensor cores multiply.
ROWS = 16


@dataclass(frozen=True)
class _Tile:
    columns: int  # columns of the result
    depth: int  # the number of terms that one step adds
    stages: int  # the number of steps that load operands at the same time
    warps: int


#: Of the tiles that were tried on an H200 (2026-11-30), among the fastest for three shapes and one to four tokens. They
#: fit the 99 KiB of shared memory per block that SM86 and SM89 have.
_UP = _Tile(64, depth=64, stages=5, warps=4)
_DOWN = _Tile(128, depth=64, stages=4, warps=4)


def takes_few(num_choices: int, config: MoEConfig) -> bool:
    """Return whether `few_tokens` is the fastest way to compute so many choices."""
    return 0 < num_choices <= min(MAX_CHOICES, MAX_CHOICES_PER_EXPERT * config.n_routed_experts)


def few_tokens(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    config: MoEConfig,
    first: int,
) -> Tensor:
    """Return the local experts' sum [T, D], as an engine does (`Compute`), without gradients.

    x and the parameters are bfloat16 or float16. Sums are in float32. Only the weighted activation is rounded before
    the result is. Tokens and routing weights of choices that are not local may be anything, even NaN.
    """
    form = activation_form(config)
    num_tokens, k = indices_TK.shape
    experts, inter, dim = parameters.down_projs.shape
    up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in parameters[2:])
    x_TD, weights_TK, indices_TK = x_TD.contiguous(), weights_TK.contiguous(), indices_TK.contiguous()
    read = _UP.columns * (2 if form.interleaved else 1)
    after = config.apply_router_weight_after_down
    blocks = triton.cdiv(dim, _DOWN.columns)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x_TD.device)

    a_SI, y_SD = empty(x_TD.dtype, num_tokens * k, inter), empty(torch.float32, num_tokens * k, dim)
    num_finished = empty(torch.int32, num_tokens, blocks)
    out_TD = empty(x_TD.dtype, num_tokens, dim)
    shared = {"EXPERTS": experts, "K": k, "CHOICES": triton.next_power_of_2(num_tokens * k), "ROWS": ROWS}
    launch(
        few_up_gemm,
        (num_tokens * k, triton.cdiv(inter, _UP.columns)),
        *(
            x_TD,
            described(parameters.gate_and_up_projs, [1, _UP.depth, read]),
            a_SI,
            num_finished,
            up_bias,
            None if after else weights_TK,
            indices_TK,
        ),
        *(num_tokens * k, first, form.alpha, form.limit, form.offset),
        **shared,
        DEPTH=dim,
        WIDTH=inter,
        BLOCKS=blocks,
        GATED=form.gated,
        INTERLEAVED=form.interleaved,
        GELU=form.gelu,
        LIMITED=form.limit > 0,
        WEIGHTS=not after,
        BIAS=up_bias is not None,
        COLUMNS=_UP.columns,
        STEP=_UP.depth,
        num_stages=_UP.stages,
        num_warps=_UP.warps,
    )
    launch(
        few_down_gemm,
        (num_tokens * k, blocks),
        *(a_SI, described(parameters.down_projs, [1, _DOWN.depth, _DOWN.columns]), y_SD, num_finished, out_TD),
        *(down_bias, weights_TK, indices_TK, num_tokens * k, first),
        **shared,
        DEPTH=inter,
        WIDTH=dim,
        AFTER=after,
        BIAS=down_bias is not None,
        COLUMNS=_DOWN.columns,
        STEP=_DOWN.depth,
        num_stages=_DOWN.stages,
        num_warps=_DOWN.warps,
    )
    return out_TD


@triton.jit
def _find_rows(indices, num_choices, first, EXPERTS: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr):
    """Return this program's local expert, whether there is such an expert, the rows' slots, and the number of rows.

    The number of rows is zero if another program has this program's choice among its rows.
    """
    own = tl.program_id(0)
    chosen = tl.load(indices + own)
    slots = tl.arange(0, CHOICES)
    same = (tl.load(indices + slots, mask=slots < num_choices, other=-1) == chosen) & (slots < num_choices)
    before = tl.sum((same & (slots < own)).to(tl.int32), 0)
    row_of_slot = tl.cumsum(same.to(tl.int32), 0) - 1 - before
    is_row = (tl.arange(0, ROWS)[:, None] == row_of_slot[None, :]) & same[None, :]
    slot_of_row = tl.sum(tl.where(is_row, slots[None, :], 0), 1)
    num_rows = tl.minimum(tl.sum(same.to(tl.int32), 0) - before, ROWS)
    local = (chosen >= first) & (chosen < first + EXPERTS)
    return (chosen - first).to(tl.int32), local, slot_of_row, tl.where(before % ROWS == 0, num_rows, 0)


@triton.jit(do_not_specialize=["num_choices", "first"])
def few_up_gemm(
    x,
    b,
    a,
    num_finished,
    bias,
    weights,
    indices,
    num_choices,
    first,
    alpha,
    limit,
    offset,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GELU: tl.constexpr,
    LIMITED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write the weighted activation of each local choice, and zeros to the counters of `few_down_gemm`.

    A tile [STEP, READ] of b has columns of gate and up in turn (INTERLEAVED), of gate, or of an activation without
    gate. With gate and up in halves, a second tile has the columns of up.
    """
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    READ: tl.constexpr = COLUMNS * (2 if INTERLEAVED else 1)
    B_WIDTH: tl.constexpr = WIDTH * (2 if GATED else 1)
    own, block = tl.program_id(0), tl.program_id(1)
    if (own % K == 0) & (block == 0):
        for start in range(0, BLOCKS, 128):
            counters = start + tl.arange(0, 128)
            zeros = tl.zeros([128], dtype=tl.int32)
            tl.store(num_finished + own // K * BLOCKS + counters, zeros, mask=counters < BLOCKS)
    expert, local, slot, num_rows = _find_rows(indices, num_choices, first, EXPERTS, CHOICES, ROWS)
    if (num_rows == 0) | (local == 0):
        return
    valid = tl.arange(0, ROWS) < num_rows
    terms = tl.arange(0, STEP)
    x_row = x + (slot // K)[:, None] * DEPTH + terms[None, :]
    sums = tl.zeros([ROWS, READ], dtype=tl.float32)
    if HALVES:
        up_sums = tl.zeros([ROWS, READ], dtype=tl.float32)
    for start in range(0, DEPTH, STEP):
        inside = start + terms < DEPTH
        x_tile = tl.load(x_row + start, mask=valid[:, None] & inside[None, :], other=0.0)
        sums = tl.dot(x_tile, load_weights(b, expert, start, block * READ, STEP, READ, False), sums)
        if HALVES:
            up_tile = load_weights(b, expert, start, WIDTH + block * READ, STEP, READ, False)
            up_sums = tl.dot(x_tile, up_tile, up_sums)

    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    if BIAS:
        read = block * READ + tl.arange(0, READ)
        within = read < (2 * WIDTH if INTERLEAVED else WIDTH)
        bias += expert.to(tl.int64) * B_WIDTH
        sums += tl.load(bias + read, mask=within, other=0.0).to(tl.float32)[None, :]
        if HALVES:
            up_sums += tl.load(bias + WIDTH + read, mask=within, other=0.0).to(tl.float32)[None, :]
    if INTERLEAVED:
        sums, up_sums = tl.split(tl.reshape(sums, [ROWS, COLUMNS, 2]))
    if GATED:
        value, _, _ = glu(sums, up_sums, alpha, limit, offset, GELU, LIMITED)
    else:
        rectified = tl.where(sums < 0, 0.0, sums)
        value = rectified * rectified
    if WEIGHTS:
        value *= tl.load(weights + slot, mask=valid, other=0.0).to(tl.float32)[:, None]
    where = a + slot[:, None] * WIDTH + columns[None, :]
    tl.store(where, value.to(a.dtype.element_ty), mask=valid[:, None] & (columns < WIDTH)[None, :])


@triton.jit(do_not_specialize=["num_choices", "first"])
def few_down_gemm(
    a,
    b,
    y,
    num_finished,
    out,
    bias,
    weights,
    indices,
    num_choices,
    first,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    AFTER: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write each local choice's product to y in float32, and each token's sum to out."""
    expert, local, slot, num_rows = _find_rows(indices, num_choices, first, EXPERTS, CHOICES, ROWS)
    if num_rows == 0:
        return
    rows = tl.arange(0, ROWS)
    block = tl.program_id(1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < WIDTH
    if local:
        valid = rows < num_rows
        terms = tl.arange(0, STEP)
        a_row = a + slot[:, None] * DEPTH + terms[None, :]
        sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, DEPTH, STEP):
            inside = start + terms < DEPTH
            a_tile = tl.load(a_row + start, mask=valid[:, None] & inside[None, :], other=0.0)
            b_tile = load_weights(b, expert, start, block * COLUMNS, STEP, COLUMNS, False)
            sums = tl.dot(a_tile, b_tile, sums)
        tl.store(y + slot[:, None] * WIDTH + columns[None, :], sums, mask=valid[:, None] & within[None, :])
    tl.debug_barrier()  # every warp must have written its part of y before the counters say so
    for row in range(num_rows):
        token = tl.sum(tl.where(rows == row, slot, 0), 0) // K
        counter = num_finished + token * tl.cdiv(WIDTH, COLUMNS) + block
        if tl.atomic_add(counter, 1, sem="acq_rel") == K - 1:
            total = tl.zeros([COLUMNS], dtype=tl.float32)
            for k in tl.static_range(K):
                own = token * K + k
                own_expert = tl.load(indices + own).to(tl.int64) - first
                is_local = (own_expert >= 0) & (own_expert < EXPERTS)
                found = within & is_local
                # other programs wrote y, so the load must not take it from this multiprocessor's own cache
                value = tl.load(y + own * WIDTH + columns, mask=found, other=0.0, cache_modifier=".cg")
                if BIAS or AFTER:
                    weight = tl.load(weights + own, mask=is_local, other=0.0).to(tl.float32)
                if BIAS:
                    added = tl.load(bias + own_expert * WIDTH + columns, mask=found, other=0.0).to(tl.float32)
                    value += added if AFTER else weight * added
                if AFTER:
                    value *= weight
                total += value
            tl.store(out + token * WIDTH + columns, total.to(out.dtype.element_ty), mask=within)
