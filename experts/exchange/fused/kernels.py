"""Define the Triton kernels that `experts.exchange.fused` launches."""

import triton
import triton.language as tl


@triton.jit
def _part(addresses, rank, START: tl.constexpr, DTYPE: tl.constexpr):
    """Return the pointer to a part of a rank's region. As its alignment is known, Triton moves 16 bytes at a time."""
    return tl.multiple_of((tl.load(addresses + rank) + START).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _either(condition, one, other):
    """Return the pointer `one` if the condition holds, else `other`. Both are aligned as the parts of a region are."""
    address = tl.where(condition, one.to(tl.int64, bitcast=True), other.to(tl.int64, bitcast=True))
    return tl.multiple_of(address.to(tl.pointer_type(one.dtype.element_ty)), 16)


@triton.jit
def _goes(indices, token, num_tokens, to, n_local_experts, K: tl.constexpr, CHOICES: tl.constexpr):
    """Return 1 for each token that chose an expert of a rank, and 0 for the others."""
    choice = tl.arange(0, CHOICES)
    where = token.to(tl.int64)[:, None] * K + choice[None, :]
    expert = tl.load(indices + where, mask=(token < num_tokens)[:, None] & (choice < K)[None, :], other=-1)
    local = expert - to.to(tl.int64) * n_local_experts
    return tl.max(((local >= 0) & (local < n_local_experts)).to(tl.int32), axis=1)


@triton.jit
def number_tokens(
    indices,
    rows,
    num_tokens,
    n_local_experts,
    P: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Number the tokens of a block that go to one rank, and return how many go there up to the end of the block.

    Each program has one block and one rank. It counts the tokens in the blocks before its own itself. So programs do
    not wait for each other, and one launch is enough.
    """
    block, to = tl.program_id(0), tl.program_id(1)
    place_in_block = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, block * BLOCK, BLOCK):
        before += _goes(indices, start + place_in_block, num_tokens, to, n_local_experts, K, CHOICES)
    first = tl.sum(before, 0)
    token = block * BLOCK + place_in_block
    goes = _goes(indices, token, num_tokens, to, n_local_experts, K, CHOICES)
    row = tl.where(goes > 0, first + tl.cumsum(goes, 0) - 1, -1)
    tl.store(rows + token.to(tl.int64) * P + to, row, mask=token < num_tokens)
    return first + tl.sum(goes, 0)


@triton.jit
def place(
    indices,
    rows,
    addresses,
    num_tokens,
    rank,
    n_local_experts,
    COUNTS_AT: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Number the tokens of a block. The program of the last block tells all ranks how many tokens go to its rank."""
    count = number_tokens(indices, rows, num_tokens, n_local_experts, P, K, CHOICES, BLOCK)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        for reader in tl.static_range(P):
            tl.store(_part(addresses, reader, COUNTS_AT, tl.int32) + rank * P + tl.program_id(1), count)


@triton.jit
def push(
    x,
    rows,
    own,
    weights,
    indices,
    addresses,
    rank,
    dim,
    rows_per_slab,
    WITH_CHOICES: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    INDICES_AT: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    STRETCH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    values = tl.load(x + token * dim + columns, mask=columns < dim, other=0.0)
    if WITH_CHOICES:
        choice = tl.arange(0, CHOICES)
        is_choice = (choice < K) & (tl.program_id(1) == 0)
        weight = tl.load(weights + token * K + choice, mask=is_choice, other=0.0)
        index = tl.load(indices + token * K + choice, mask=is_choice, other=-1)
        index = tl.minimum(tl.maximum(index, -1), 0x7FFFFFFF).to(tl.int32)
    for to in tl.static_range(P):
        row = tl.load(rows + token * P + to)
        fits = (row >= 0) & (row < rows_per_slab)
        at = row.to(tl.int64) + rank * rows_per_slab
        target = _either(to == rank, own, _part(addresses, to, 0, x.dtype.element_ty))
        tl.store(target + at * dim + columns, values, mask=(columns < dim) & fits)
        if WITH_CHOICES:
            target_weights = _part(addresses, to, WEIGHTS_AT, weights.dtype.element_ty)
            tl.store(target_weights + at * K + choice, weight, mask=is_choice & fits)
            target_indices = _part(addresses, to, INDICES_AT, tl.int32)
            tl.store(target_indices + at * K + choice, index, mask=is_choice & fits)


@triton.jit
def push_back(
    y,
    weights,
    counts,
    addresses,
    rank,
    dim,
    rows_per_slab,
    WITH_WEIGHTS: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    STRETCH: tl.constexpr,
):
    row = tl.program_id(0)
    to = row // rows_per_slab
    row_of_slab = row - to * rows_per_slab
    wanted = (to != rank) & (row_of_slab < tl.load(counts + to))
    at = row_of_slab.to(tl.int64) + rank * rows_per_slab
    columns = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    inside = (columns < dim) & wanted
    values = tl.load(y + row.to(tl.int64) * dim + columns, mask=inside, other=0.0)
    tl.store(_part(addresses, to, 0, y.dtype.element_ty) + at * dim + columns, values, mask=inside)
    if WITH_WEIGHTS:
        choice = tl.arange(0, CHOICES)
        is_choice = (choice < K) & (tl.program_id(1) == 0) & wanted
        weight = tl.load(weights + row.to(tl.int64) * K + choice, mask=is_choice, other=0.0)
        tl.store(_part(addresses, to, WEIGHTS_AT, weights.dtype.element_ty) + at * K + choice, weight, mask=is_choice)


@triton.jit
def sum_rows(
    sums,
    weights,
    rows,
    own,
    own_weights,
    region,
    region_weights,
    rank,
    dim,
    rows_per_slab,
    WITH_WEIGHTS: tl.constexpr,
    SUM: tl.constexpr,
    WEIGHTS_SUM: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    STRETCH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    total = tl.zeros([STRETCH], dtype=SUM)
    if WITH_WEIGHTS:
        choice = tl.arange(0, CHOICES)
        is_choice = (choice < K) & (tl.program_id(1) == 0)
        weights_total = tl.zeros([CHOICES], dtype=WEIGHTS_SUM)
    for source in tl.static_range(P):
        row = tl.load(rows + token * P + source)
        has = (row >= 0) & (row < rows_per_slab)
        at = row.to(tl.int64) + source * rows_per_slab
        part = _either(source == rank, own, region)
        total += tl.load(part + at * dim + columns, mask=(columns < dim) & has, other=0.0).to(SUM)
        if WITH_WEIGHTS:
            weights_part = _either(source == rank, own_weights, region_weights)
            weights_total += tl.load(weights_part + at * K + choice, mask=is_choice & has, other=0.0).to(WEIGHTS_SUM)
    tl.store(sums + token * dim + columns, total.to(sums.dtype.element_ty), mask=columns < dim)
    if WITH_WEIGHTS:
        tl.store(weights + token * K + choice, weights_total.to(weights.dtype.element_ty), mask=is_choice)


@triton.jit
def take_choices(
    weights,
    indices,
    counts,
    weights_out,
    indices_out,
    counts_out,
    rank,
    rows_per_slab,
    num_rows,
    P: tl.constexpr,
    RANKS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = row // rows_per_slab
    count = tl.load(counts + source * P + rank, mask=row < num_rows, other=0)
    filled = (row - source * rows_per_slab < count)[:, None]
    choice = tl.arange(0, CHOICES)[None, :]
    where = row.to(tl.int64)[:, None] * K + choice
    inside = (row < num_rows)[:, None] & (choice < K)
    weight = tl.load(weights + where, mask=inside & filled, other=0.0)
    index = tl.load(indices + where, mask=inside & filled, other=-1)
    tl.store(weights_out + where, weight, mask=inside)
    tl.store(indices_out + where, index.to(tl.int64), mask=inside)
    if tl.program_id(0) == 0:
        slab = tl.arange(0, RANKS)
        filled_rows = tl.load(counts + slab * P + rank, mask=slab < P, other=0)
        tl.store(counts_out + slab, tl.minimum(filled_rows, rows_per_slab), mask=slab < P)


@triton.jit
def take_rows(
    source,
    target,
    counts,
    rank,
    rows_per_slab,
    num_rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slab = row // rows_per_slab
    count = tl.load(counts + slab, mask=row < num_rows, other=0)
    wanted = (row - slab * rows_per_slab < count) & (slab != rank)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = wanted[:, None] & (columns < width)[None, :]
    where = row.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(target + where, tl.load(source + where, mask=inside, other=0.0), mask=inside)
