"""Define the Triton kernel that multiplies rows in FP8 by their experts' matrices in FP8."""

import triton
import triton.language as tl

from experts.gemm.kernels import TILE_FIELDS, find_tile

_BLOCK = tl.constexpr(128)


@triton.jit
def fp8_gemm(
    a,
    a_scales,
    b,
    b_scales,
    out,
    row_to_slot,
    offsets,
    tiles,
    num_scales,
    EXPERTS: tl.constexpr,
    P_WIDTH: tl.constexpr,
    P_HALVES: tl.constexpr,
    P_BLOCKS: tl.constexpr,
    Q_WIDTH: tl.constexpr,
    Q_HALVES: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    K: tl.constexpr,
    LISTED: tl.constexpr,
    GATHER: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    MOST: tl.constexpr,
):
    """Sum 128 products at a time in the tensor cores, and add the sums, times their two scales, in float32."""
    WIDTH: tl.constexpr = Q_WIDTH * Q_HALVES
    if LISTED:
        num_tiles = tl.load(tiles)
    else:
        if tiles is not None and tl.program_id(0) >= tl.load(tiles + 1) * (Q_BLOCKS * Q_HALVES):
            return  # `find_tile` would take longer to find no tile
        expert, q_block, first_row, end = find_tile(offsets, EXPERTS, BINS, ROWS, Q_BLOCKS * Q_HALVES, MOST)
        if expert >= EXPERTS:
            return
        num_tiles = tl.num_programs(0)  # one tile per program
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        if LISTED:
            entry = tiles + (1 + tile) * TILE_FIELDS
            expert, q_block = tl.load(entry), tl.load(entry + 1)
            first_row, end = tl.load(entry + 2), tl.load(entry + 3)
        row = first_row + tl.arange(0, ROWS)
        valid = row < end
        source = row.to(tl.int64)
        if GATHER:
            source = tl.load(row_to_slot + row, mask=valid, other=0) // K
            source_row = a + source[:, None] * (P_WIDTH * P_HALVES) + tl.arange(0, _BLOCK)[None, :]
        q_half = q_block // Q_BLOCKS
        q = q_block % Q_BLOCKS * _BLOCK
        b_scale_row = b_scales + (expert.to(tl.int64) * (Q_BLOCKS * Q_HALVES) + q_block) * (P_BLOCKS * P_HALVES)
        total = tl.zeros([ROWS, _BLOCK], dtype=tl.float32)
        for block in range(P_BLOCKS * P_HALVES):
            half = block // P_BLOCKS
            p = block % P_BLOCKS * _BLOCK
            if GATHER:
                inside = valid[:, None] & (p + tl.arange(0, _BLOCK) < P_WIDTH)[None, :]
                a_tile = tl.load(source_row + half * P_WIDTH + p, mask=inside, other=0.0)
            else:
                a_tile = a.load([first_row, half, p]).reshape(ROWS, _BLOCK)
            b_tile = b.load([expert, q_half * Q_WIDTH + q, half, p]).reshape(_BLOCK, _BLOCK)
            a_scale = tl.load(a_scales + block * num_scales + source, mask=valid, other=0.0)
            scale = a_scale * tl.load(b_scale_row + block)
            total += tl.dot(a_tile, b_tile.T) * scale[:, None]
        column = q + tl.arange(0, _BLOCK)
        where = row.to(tl.int64)[:, None] * WIDTH + q_half * Q_WIDTH + column[None, :]
        tl.store(out + where, total.to(out.dtype.element_ty), mask=valid[:, None] & (column < Q_WIDTH)[None, :])


@triton.jit
def fp8_outer(
    a,
    a_scales,
    b,
    b_scales,
    out,
    ends,
    P: tl.constexpr,
    Q_WIDTH: tl.constexpr,
    Q_HALVES: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
):
    """Sum the products of an expert's blocks of rows for 128 × 128 numbers of a weight's gradient."""
    p = tl.program_id(0) * _BLOCK
    q_block, expert = tl.program_id(1), tl.program_id(2)
    q_half, q = q_block // Q_BLOCKS, q_block % Q_BLOCKS * _BLOCK
    row = p + tl.arange(0, _BLOCK)
    valid = row < P
    total = tl.zeros([_BLOCK, _BLOCK], dtype=tl.float32)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    for block in range(start, tl.load(ends + expert)):
        a_tile = a.load([block, p, 0]).reshape(_BLOCK, _BLOCK)
        b_tile = b.load([block, q_half * Q_WIDTH + q, 0]).reshape(_BLOCK, _BLOCK)
        a_scale = tl.load(a_scales + block * P + row, mask=valid, other=0.0)
        scale = a_scale * tl.load(b_scales + block * (Q_BLOCKS * Q_HALVES) + q_block)
        total += tl.dot(a_tile, b_tile.T) * scale[:, None]
    column = q + tl.arange(0, _BLOCK)
    where = expert.to(tl.int64) * EXPERT_STRIDE + row[:, None] * ROW_STRIDE + q_half * Q_WIDTH + column[None, :]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=valid[:, None] & (column < Q_WIDTH)[None, :])
