"""Quantise rows and weights to FP8 with one scale a block, each in one kernel that reads its input once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.fp8.blocks import BLOCK, E4M3, Matrices, Rows, num_blocks, stored_width
from experts.fp8.rounding import interpreted, largest, reciprocal, scale_of, to_fp8
from experts.fp8.tokens import PACKED, Fp8Tokens, packed_width, unpacked
from experts.steps import Permutation
from experts.steps.fused.launch import launch

_BLOCK = tl.constexpr(BLOCK)
#: Blocks of a row per program.
BLOCKS_AT_ONCE = 8
WEIGHT_WARPS = 8


def quantise_tokens(x_TD: Tensor, dtype: torch.dtype = E4M3) -> Rows:
    """Return the tokens [T, D] in FP8."""
    return _quantise_rows(x_TD, None, dtype)


def quantise_and_gather(x_TD: Tensor, permutation: Permutation, dtype: torch.dtype = E4M3) -> Rows:
    """Return each row's token [N, D] in FP8. A token is read once. Rows past the last group stay unwritten.

    Tokens that are in FP8 already keep their numbers and scales; they must have the format `dtype`.
    """
    return _quantise_rows(x_TD, permutation, dtype)


def _quantise_rows(x_TD: Tensor, permutation: Permutation | None, dtype: torch.dtype) -> Rows:
    num_rows, dim = x_TD.shape[0] if permutation is None else permutation.num_rows, x_TD.shape[1]
    values = torch.empty(num_rows, dim, dtype=dtype, device=x_TD.device)
    scales = torch.empty(num_blocks(dim), num_rows, dtype=torch.float32, device=x_TD.device)
    _launch_quantise(x_TD, values, scales.t(), permutation)
    return Rows(values, scales)


def quantise_packed(x_TD: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """Return the tokens [T, D] in FP8, packed as `experts.fp8.tokens.unpacked` reads them."""
    num_tokens, dim = x_TD.shape
    packed_TW = torch.empty(num_tokens, packed_width(dim), dtype=PACKED, device=x_TD.device)
    tokens = unpacked(packed_TW, dim, dtype, x_TD.dtype)
    _launch_quantise(x_TD, tokens.quantised, tokens.scales, None)
    return packed_TW


def _launch_quantise(x_TD: Tensor, values: Tensor, scales: Tensor, permutation: Permutation | None) -> None:
    """Write the tokens, or each row's token, into values [N, D] and scales [N, blocks of D]."""
    num_tokens, dim = x_TD.shape
    blocks = min(BLOCKS_AT_ONCE, triton.next_power_of_2(num_blocks(dim)))
    given, given_scales = (x_TD.quantised, x_TD.scales) if isinstance(x_TD, Fp8Tokens) else (x_TD.contiguous(), None)
    assert given_scales is None or given.dtype is values.dtype
    launch(
        quantise_rows,
        (num_tokens, triton.cdiv(num_blocks(dim), blocks)),
        *(given, given_scales, values, scales),
        *(None, None) if permutation is None else (permutation.slot_to_row_S, permutation.offsets_L[-1:]),
        *(dim, given.stride(0), 0 if given_scales is None else given_scales.stride(0)),
        *(values.stride(0), *scales.stride()),
        K=1 if permutation is None else permutation.n_activated_experts,
        GATHER=permutation is not None,
        LARGEST=largest(values.dtype),
        BLOCKS=blocks,
        EXACT=interpreted(),
        num_warps=4,
    )


def quantise_weights(b_LPQ: Tensor, halves: int, into: Matrices | None = None) -> Matrices:
    """Return weights [L, P, Q], whose Q has `halves` parts, in FP8 as [L, Q, P], to multiply rows [N, P] by.

    With `into`, write them into its memory.
    """
    experts, p, q = b_LPQ.shape
    if into is None:
        into = _empty_matrices(experts, q, p, halves, 1, b_LPQ.device)
    _quantise_matrices(b_LPQ, halves, None, into)
    return into


def quantise_weights_both(
    b_LPQ: Tensor,
    halves: int,
    into: Matrices | None = None,
    into_back: Matrices | None = None,
    padded: bool = False,
) -> tuple[Matrices, Matrices]:
    """Return what `quantise_weights` and `quantise_weights_back` return. The weights are read once."""
    experts, p, q = b_LPQ.shape
    into = into or _empty_matrices(experts, q, p, halves, 1, b_LPQ.device)
    into_back = into_back or _empty_matrices(experts, p, q, 1, halves, b_LPQ.device, padded)
    _quantise_matrices(b_LPQ, halves, into_back, into)
    return into, into_back


def quantise_weights_back(b_LPQ: Tensor, halves: int, padded: bool = False) -> Matrices:
    """Return weights [L, P, Q], whose Q has `halves` parts, in FP8 as they are, to multiply gradients [N, Q] by.

    With `padded`, zeros fill up the parts of Q (`experts.fp8.blocks.stored_width`).
    """
    experts, p, q = b_LPQ.shape
    into = _empty_matrices(experts, p, q, 1, halves, b_LPQ.device, padded)
    _quantise_matrices(b_LPQ, halves, into, None)
    return into


def _empty_matrices(
    experts: int, q: int, p: int, q_halves: int, p_halves: int, device: torch.device, padded: bool = False
) -> Matrices:
    blocks = q_halves * num_blocks(q // q_halves), p_halves * num_blocks(p // p_halves)
    stored_p = p_halves * stored_width(p // p_halves, p_halves, padded)
    values = torch.empty(experts, q, stored_p, dtype=E4M3, device=device)
    scales = torch.empty(experts, *blocks, dtype=torch.float32, device=device)
    return Matrices(values, scales, q_halves, p_halves)


def _quantise_matrices(b_LPQ: Tensor, halves: int, natural: Matrices | None, turned: Matrices | None) -> None:
    experts, p, q = b_LPQ.shape
    launch(
        quantise_matrices,
        (halves * num_blocks(q // halves), num_blocks(p), experts),
        b_LPQ.contiguous(),
        None if natural is None else natural.values,
        None if turned is None else turned.values,
        *(None if made is None else made.scales for made in (natural, turned)),
        *(p, q // halves),
        HALVES=halves,
        PADDED=natural is not None and natural.values.shape[2] > q,
        LARGEST=largest(E4M3),
        EXACT=interpreted(),
        num_warps=WEIGHT_WARPS,
    )


def transposed(
    matrices: Matrices, into: Matrices | None = None, padded: bool = False, rows: int | None = None
) -> Matrices:
    """Return the matrices [L, Q, P] as [L, P, Q], with the same values. With `into`, write them into its memory.

    With `padded`, zeros fill up the parts of Q in the result. If they fill up the parts of P in the matrices, `rows` is
    the P of the result. Only one of both may be filled up.
    """
    experts, q, stored_p = matrices.values.shape
    p = stored_p if rows is None else rows
    if into is None:
        into = _empty_matrices(experts, p, q, matrices.p_halves, matrices.q_halves, matrices.values.device, padded)
    stored_q = into.values.shape[2]
    # a part for each half that has zeros after it
    q_parts, p_parts = matrices.q_halves if stored_q > q else 1, matrices.p_halves if stored_p > p else 1
    q_width, p_width = q // q_parts, p // p_parts
    launch(
        transpose_matrices,
        (triton.cdiv(p_width, BLOCK), triton.cdiv(q_width, BLOCK), experts * q_parts * p_parts),
        *(matrices.values.view(torch.uint8), into.values.view(torch.uint8)),
        *(q_width, p_width, stored_q // q_parts),
        *(q * stored_p, q_width * stored_p if q_parts > 1 else stored_p // p_parts, stored_p),
        *(p * stored_q, stored_q // q_parts if q_parts > 1 else p_width * stored_q, stored_q),
        PARTS=q_parts * p_parts,
        num_warps=WEIGHT_WARPS,
    )
    into.scales.copy_(matrices.scales.mT)
    return into


@triton.jit
def quantise_rows(
    x,
    x_scales,
    values,
    scales,
    slot_to_row,
    num_local,
    dim,
    x_stride,
    x_scales_stride,
    values_stride,
    scales_stride,
    block_stride,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Quantise a stretch of a token. If `x_scales` is not None, x is in FP8 already, and its numbers are copied."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = column < dim
    stored = block < tl.cdiv(dim, _BLOCK)
    wanted = 1
    if GATHER:
        end = tl.load(num_local)
        wanted = 0
        for k in tl.static_range(K):
            wanted += (tl.load(slot_to_row + token * K + k) < end).to(tl.int32)
    tile = tl.load(x + token * x_stride + column, mask=inside & (wanted > 0), other=0.0)
    if x_scales is None:
        tile = tile.to(tl.float32)
        scale = scale_of(tl.max(tl.abs(tile), axis=1, keep_dims=True), LARGEST)
        quantised = to_fp8(tile * reciprocal(scale), LARGEST, EXACT).to(values.dtype.element_ty)
        scale = tl.reshape(scale, [BLOCKS])
    else:
        quantised = tile
        scale = tl.load(x_scales + token * x_scales_stride + block, mask=stored & (wanted > 0), other=0.0)
    target = scales + block.to(tl.int64) * block_stride
    if GATHER:
        for k in tl.static_range(K):
            row = tl.load(slot_to_row + token * K + k)
            local = row < end
            tl.store(values + row * values_stride + column, quantised, mask=inside & local)
            tl.store(target + row * scales_stride, scale, mask=stored & local)
    else:
        tl.store(values + token * values_stride + column, quantised, mask=inside)
        tl.store(target + token * scales_stride, scale, mask=stored)


@triton.jit
def quantise_matrices(
    b,
    natural,
    turned,
    scales,
    turned_scales,
    p_width,
    q_width,
    HALVES: tl.constexpr,
    PADDED: tl.constexpr,
    LARGEST: tl.constexpr,
    EXACT: tl.constexpr,
):
    width_blocks, p_blocks = tl.cdiv(q_width, _BLOCK), tl.cdiv(p_width, _BLOCK)
    q_blocks = HALVES * width_blocks
    whole = HALVES * q_width
    q_block, p_block, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    matrix = expert * p_width * whole
    part = q_block // width_blocks
    first_column = q_block % width_blocks * _BLOCK
    column = first_column + tl.arange(0, _BLOCK)
    row = p_block * _BLOCK + tl.arange(0, _BLOCK)
    inside = (row < p_width)[:, None] & (column < q_width)[None, :]
    q = part * q_width + column
    tile = tl.load(b + matrix + row[:, None] * whole + q[None, :], mask=inside, other=0.0)
    scale = scale_of(tl.max(tl.max(tl.abs(tile.to(tl.float32)), axis=1), axis=0), LARGEST)
    if natural is not None:
        value = to_fp8(tile.to(tl.float32) * reciprocal(scale), LARGEST, EXACT).to(natural.dtype.element_ty)
        where, stored = natural + matrix + row[:, None] * whole + q[None, :], inside
        if PADDED:  # whole blocks follow each other, also where the next half begins
            width = q_blocks * _BLOCK
            first = natural + expert * p_width * width + q_block * _BLOCK
            where, stored = first + row[:, None] * width + tl.arange(0, _BLOCK)[None, :], (row < p_width)[:, None]
        tl.store(where, value, mask=stored)
        tl.store(scales + (expert * p_blocks + p_block) * q_blocks + q_block, scale)
    if turned is not None:
        # the 16 bits are transposed: 8 bits would be moved one by one
        value = to_fp8(tl.trans(tile).to(tl.float32) * reciprocal(scale), LARGEST, EXACT).to(turned.dtype.element_ty)
        where = turned + matrix + q[:, None] * p_width + row[None, :]
        tl.store(where, value, mask=(column < q_width)[:, None] & (row < p_width)[None, :])
        tl.store(turned_scales + (expert * q_blocks + q_block) * p_blocks + p_block, scale)


@triton.jit
def transpose_matrices(
    source,
    target,
    q_width,
    p_width,
    stored_width,
    source_matrix,
    source_part,
    source_row,
    target_matrix,
    target_part,
    target_row,
    PARTS: tl.constexpr,
):
    """Transpose a tile of one of the PARTS of a matrix. The arguments from `source_matrix` on are strides.

    A row of the part has `stored_width` columns in the target, where the ones past `q_width` are zeros.
    """
    p = tl.program_id(0) * _BLOCK + tl.arange(0, _BLOCK)
    q = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    index = tl.program_id(2).to(tl.int64)
    expert, part = index // PARTS, index % PARTS
    source += expert * source_matrix + part * source_part
    target += expert * target_matrix + part * target_part
    inside = (q < q_width)[:, None] & (p < p_width)[None, :]
    tile = tl.load(source + q[:, None] * source_row + p[None, :], mask=inside, other=0)
    stored = (p < p_width)[:, None] & (q < stored_width)[None, :]
    tl.store(target + p[:, None] * target_row + q[None, :], tl.trans(tile), mask=stored)
