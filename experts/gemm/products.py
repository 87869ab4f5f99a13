"""Each row times its expert's matrix: rows in groups by expert, whose ends are on the device alone.

The grid has as many programs as any routing could need, and those without a tile end at once: nothing waits for the
device, and a CUDA graph replays with another routing. Tiles are in the order expert, columns, rows, so that an expert's
weights come from memory once, and from L2 for its other rows. Weights are copied by the tensor memory accelerator where
there is one, rows of tokens from wherever they are. Sums are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from experts.activations import ActivationForm, activation_form
from experts.config import MoEConfig
from experts.gemm import tiling
from experts.steps import Permutation
from experts.steps.fused.launch import launch
from experts.steps.fused.tiles import glu

_PLAIN = ActivationForm(gated=False)


def product(a_NP: Tensor, b_LPQ: Tensor, permutation: Permutation, rows_per_expert: float) -> Tensor:
    """a·b [N, Q]. `rows_per_expert`: about how many, to tile by. Rows past the last group stay unwritten."""
    return _multiply(a_NP, b_LPQ, permutation, rows_per_expert, gather=False)


def gathered_product(x_TP: Tensor, b_LPQ: Tensor, permutation: Permutation, rows_per_expert: float) -> Tensor:
    """`product` of each row's token, read where it is."""
    return _multiply(x_TP, b_LPQ, permutation, rows_per_expert, gather=True)


def activated_product(
    x_TD: Tensor,
    b_LDH: Tensor,
    permutation: Permutation,
    rows_per_expert: float,
    weights_TK: Tensor | None,
    bias_LH: Tensor | None,
    config: MoEConfig,
) -> Tensor:
    """The weighted activation [N, I] of `gathered_product` + bias, as `Steps.activate`, and from float32 sums."""
    form = activation_form(config)
    return _multiply(x_TD, b_LDH, permutation, rows_per_expert, True, form, weights_TK, bias_LH)


def _multiply(
    a: Tensor,
    b_LPQ: Tensor,
    permutation: Permutation,
    rows_per_expert: float,
    gather: bool,
    form: ActivationForm | None = None,
    weights_TK: Tensor | None = None,
    bias_LQ: Tensor | None = None,
) -> Tensor:
    experts, depth, width = b_LPQ.shape
    activate, form = form is not None, form or _PLAIN
    out_width = width // 2 if form.gated else width
    out = torch.empty(permutation.num_rows, out_width, dtype=a.dtype, device=a.device)
    tile = tiling.tiling_for(rows_per_expert, form.gated)
    most_blocks = permutation.num_rows // tile.rows + min(experts, permutation.num_rows)
    if most_blocks == 0:
        return out
    read_columns = tile.columns * (2 if form.interleaved else 1)
    a = a.contiguous()
    launch(
        _grouped_gemm,
        (most_blocks * triton.cdiv(out_width, tile.columns),),
        a if gather else TensorDescriptor.from_tensor(a, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(b_LPQ.contiguous(), [1, tile.depth, read_columns]),
        out,
        *(None if bias_LQ is None else bias_LQ.contiguous(), None if weights_TK is None else weights_TK.contiguous()),
        *(permutation.row_to_slot_N, permutation.offsets_L, form.alpha, form.limit, form.offset),
        EXPERTS=experts,
        DEPTH=depth,
        WIDTH=out_width,
        K=permutation.n_activated_experts,
        GATHER=gather,
        ACTIVATE=activate,
        GATED=form.gated,
        INTERLEAVED=form.interleaved,
        GELU=form.gelu,
        LIMITED=form.limit > 0,
        WEIGHTS=weights_TK is not None,
        BIAS=bias_LQ is not None,
        BINS=triton.next_power_of_2(experts),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STEP=tile.depth,
        num_stages=tile.stages,
        num_warps=tile.warps,
    )
    return out


@triton.jit
def _find_tile(offsets, EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, COLUMN_TILES: tl.constexpr):
    """This program's expert (EXPERTS or more where it has no tile), tile of columns, first row and end of its group."""
    tile = tl.program_id(0)
    bins = tl.arange(0, BINS)
    ends = tl.load(offsets + bins, mask=bins < EXPERTS, other=0)
    starts = tl.load(offsets + bins - 1, mask=(bins > 0) & (bins < EXPERTS), other=0)
    blocks = tl.cdiv(ends - starts, ROWS)
    blocks_up_to = tl.cumsum(blocks, 0)
    block = tile // COLUMN_TILES
    expert = tl.sum((blocks_up_to <= block).to(tl.int32), 0)
    own = bins == expert
    tile -= tl.sum(tl.where(own, blocks_up_to - blocks, 0), 0) * COLUMN_TILES
    own_blocks = tl.maximum(tl.sum(tl.where(own, blocks, 0), 0), 1)
    first_row = tl.sum(tl.where(own, starts, 0), 0) + tile % own_blocks * ROWS
    return expert, tile // own_blocks, first_row, tl.sum(tl.where(own, ends, 0), 0)


@triton.jit
def _load_bias(bias, expert, columns, width: tl.constexpr):
    """A row of the expert's bias in float32; what lies past a half of it is of columns that are not stored."""
    return tl.load(bias + expert.to(tl.int64) * width + columns, mask=columns < width, other=0.0).to(tl.float32)[
        None, :
    ]


@triton.jit
def _grouped_gemm(
    a,
    b,
    out,
    bias,
    weights,
    row_to_slot,
    offsets,
    alpha,
    limit,
    offset,
    EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    ACTIVATE: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GELU: tl.constexpr,
    LIMITED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIAS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    READ: tl.constexpr = 2 * COLUMNS if INTERLEAVED else COLUMNS
    expert, column_tile, first_row, end = _find_tile(offsets, EXPERTS, BINS, ROWS, tl.cdiv(WIDTH, COLUMNS))
    if expert >= EXPERTS:
        return
    row = first_row.to(tl.int64) + tl.arange(0, ROWS)
    valid = row < end
    if GATHER or WEIGHTS:
        slot = tl.load(row_to_slot + row, mask=valid, other=0)
    if GATHER:
        token_row = a + (slot // K)[:, None] * DEPTH
    sums = tl.zeros([ROWS, READ], dtype=tl.float32)
    if HALVES:
        up_sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, DEPTH, STEP):
        if GATHER:
            depth = start + tl.arange(0, STEP)
            a_tile = tl.load(token_row + depth[None, :], mask=valid[:, None] & (depth < DEPTH)[None, :], other=0.0)
        else:
            a_tile = a.load([first_row, start])
        b_tile = b.load([expert, start, column_tile * READ]).reshape(STEP, READ)
        sums = tl.dot(a_tile, b_tile, sums)
        if HALVES:
            up_tile = b.load([expert, start, WIDTH + column_tile * READ]).reshape(STEP, READ)
            up_sums = tl.dot(a_tile, up_tile, up_sums)

    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    if INTERLEAVED:
        if BIAS:
            sums += _load_bias(bias, expert, column_tile * READ + tl.arange(0, READ), 2 * WIDTH)
        sums, up_sums = tl.split(tl.reshape(sums, [ROWS, COLUMNS, 2]))
    elif BIAS:
        sums += _load_bias(bias, expert, columns, 2 * WIDTH if GATED else WIDTH)
        if GATED:
            up_sums += _load_bias(bias, expert, WIDTH + columns, 2 * WIDTH)
    if GATED:
        value, _, _ = glu(sums, up_sums, alpha, limit, offset, GELU, LIMITED)
    elif ACTIVATE:
        rectified = tl.where(sums < 0, 0.0, sums)
        value = rectified * rectified
    else:
        value = sums
    if WEIGHTS:
        value *= tl.load(weights + slot, mask=valid, other=0.0).to(tl.float32)[:, None]
    where = row[:, None] * WIDTH + columns[None, :]
    tl.store(out + where, value.to(out.dtype.element_ty), mask=valid[:, None] & (columns < WIDTH)[None, :])
