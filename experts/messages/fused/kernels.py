"""Define the Triton kernels that `experts.messages.fused` launches."""

import triton
import triton.language as tl

from experts.exchange.fused.kernels import number_tokens


@triton.jit
def _up(number, MULTIPLE: tl.constexpr):
    return (number + MULTIPLE - 1) // MULTIPLE * MULTIPLE


@triton.jit
def _length(
    count, WEIGHTS_BYTES: tl.constexpr, INDICES_BYTES: tl.constexpr, ROW_BYTES: tl.constexpr, UNIT: tl.constexpr
):
    """As `Form.length`."""
    end = _up(count * WEIGHTS_BYTES, 16) + count * INDICES_BYTES
    return _up(count, UNIT) + _up((end + ROW_BYTES - 1) // ROW_BYTES, UNIT)


@triton.jit
def _choices(rows, start, count, dim, DTYPE: tl.constexpr, WEIGHTS_BYTES: tl.constexpr, UNIT: tl.constexpr):
    """Return the pointers to the routing weights and the indices of a message that starts at a row."""
    first = rows + (start + _up(count, UNIT)).to(tl.int64) * dim
    weights = first.to(tl.pointer_type(DTYPE))
    indices = first.to(tl.pointer_type(tl.int8)) + _up(count * WEIGHTS_BYTES, 16)
    return weights, indices.to(tl.pointer_type(tl.int32))


@triton.jit
def plan(
    indices,
    rows,
    counts,
    num_tokens,
    n_local_experts,
    P: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Number the tokens of a block. The program of the last block stores how many tokens go to its rank."""
    count = number_tokens(indices, rows, num_tokens, n_local_experts, P, K, CHOICES, BLOCK)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(counts + tl.program_id(1), count)


@triton.jit
def pack(
    x,
    packed,
    rows,
    counts,
    weights,
    indices,
    dim,
    first,
    absent,
    WITH_CHOICES: tl.constexpr,
    TARGETS: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    WEIGHTS_BYTES: tl.constexpr,
    INDICES_BYTES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    UNIT: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """Write the messages to TARGETS ranks from the rank `first` on. The message to the rank `absent` is left out."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    values = tl.load(x + token * dim + columns, mask=columns < dim, other=0.0)
    if WITH_CHOICES:
        choice = tl.arange(0, CHOICES)
        is_choice = (choice < K) & (tl.program_id(1) == 0)
        weight = tl.load(weights + token * K + choice, mask=is_choice, other=0.0)
        index = tl.load(indices + token * K + choice, mask=is_choice, other=-1)
        index = tl.minimum(tl.maximum(index, -1), 0x7FFFFFFF).to(tl.int32)
    start = 0
    for target in tl.static_range(TARGETS):
        to = first + target
        count = tl.load(counts + to)
        row = tl.load(rows + token * P + to)
        goes = (row >= 0) & (to != absent)
        at = start + row.to(tl.int64)
        tl.store(packed + at * dim + columns, values, mask=(columns < dim) & goes)
        if WITH_CHOICES:
            its_weights, its_indices = _choices(
                packed, start, count, dim, weights.dtype.element_ty, WEIGHTS_BYTES, UNIT
            )
            where = row.to(tl.int64) * K + choice
            tl.store(its_weights + where, weight, mask=is_choice & goes)
            tl.store(its_indices + where, index, mask=is_choice & goes)
        start += tl.where(to == absent, 0, _length(count, WEIGHTS_BYTES, INDICES_BYTES, ROW_BYTES, UNIT))


@triton.jit
def take_choices(
    received,
    weights,
    indices,
    counts,
    dim,
    P: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    WEIGHTS_BYTES: tl.constexpr,
    INDICES_BYTES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program has some rows of the message from one rank."""
    source = tl.program_id(0)
    start = 0
    for rank in tl.static_range(P):
        length = _length(tl.load(counts + rank), WEIGHTS_BYTES, INDICES_BYTES, ROW_BYTES, UNIT)
        start += tl.where(rank < source, length, 0)
    count = tl.load(counts + source)
    end = _length(count, WEIGHTS_BYTES, INDICES_BYTES, ROW_BYTES, UNIT)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    choice = tl.arange(0, CHOICES)[None, :]
    its_weights, its_indices = _choices(received, start, count, dim, weights.dtype.element_ty, WEIGHTS_BYTES, UNIT)
    where = row.to(tl.int64)[:, None] * K + choice
    filled = (row < count)[:, None] & (choice < K)
    weight = tl.load(its_weights + where, mask=filled, other=0.0)
    index = tl.load(its_indices + where, mask=filled, other=-1)
    target = (start + row.to(tl.int64))[:, None] * K + choice
    inside = (row < end)[:, None] & (choice < K)
    tl.store(weights + target, weight, mask=inside)
    tl.store(indices + target, index.to(tl.int64), mask=inside)


@triton.jit
def sum_rows(
    packed,
    packed_own,
    packed_weights,
    packed_own_weights,
    sums,
    weights,
    rows,
    counts,
    dim,
    own,
    WITH_WEIGHTS: tl.constexpr,
    SUM: tl.constexpr,
    WEIGHTS_SUM: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    CHOICES: tl.constexpr,
    WEIGHTS_BYTES: tl.constexpr,
    INDICES_BYTES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    UNIT: tl.constexpr,
    STRETCH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    total = tl.zeros([STRETCH], dtype=SUM)
    if WITH_WEIGHTS:
        choice = tl.arange(0, CHOICES)
        is_choice = (choice < K) & (tl.program_id(1) == 0)
        weights_total = tl.zeros([CHOICES], dtype=WEIGHTS_SUM)
    start = 0
    for source in tl.static_range(P):
        row = tl.load(rows + token * P + source)
        here, there = (row >= 0) & (source == own), (row >= 0) & (source != own)
        row = row.to(tl.int64)
        at = start + row
        value = tl.load(packed + at * dim + columns, mask=(columns < dim) & there, other=0.0).to(SUM)
        total += value + tl.load(packed_own + row * dim + columns, mask=(columns < dim) & here, other=0.0).to(SUM)
        if WITH_WEIGHTS:
            weight = tl.load(packed_weights + at * K + choice, mask=is_choice & there, other=0.0).to(WEIGHTS_SUM)
            weight += tl.load(packed_own_weights + row * K + choice, mask=is_choice & here, other=0.0).to(WEIGHTS_SUM)
            weights_total += weight
        length = _length(tl.load(counts + source), WEIGHTS_BYTES, INDICES_BYTES, ROW_BYTES, UNIT)
        start += tl.where(source == own, 0, length)
    tl.store(sums + token * dim + columns, total.to(sums.dtype.element_ty), mask=columns < dim)
    if WITH_WEIGHTS:
        tl.store(weights + token * K + choice, weights_total.to(weights.dtype.element_ty), mask=is_choice)


@triton.jit
def pack_choices(weights, indices, packed, num_filled, num_elements, start, TILE: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    filled, inside = element < num_filled, element < num_elements
    weight = tl.load(weights + element, mask=filled, other=0.0)
    index = tl.load(indices + element, mask=filled, other=-1)
    index = tl.minimum(tl.maximum(index, -1), 0x7FFFFFFF).to(tl.int32)
    tl.store(packed.to(weights.dtype) + element, weight, mask=inside)
    tl.store((packed + start).to(tl.pointer_type(tl.int32)) + element, index, mask=inside)


@triton.jit
def unpack_choices(packed, weights, indices, num_elements, start, size, TILE: tl.constexpr):
    """Each program has some elements of one result of `pack_choices`."""
    part = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = element < num_elements
    first = packed + part * size
    weight = tl.load(first.to(weights.dtype) + element, mask=inside, other=0.0)
    index = tl.load((first + start).to(tl.pointer_type(tl.int32)) + element, mask=inside, other=-1)
    target = part * num_elements + element
    tl.store(weights + target, weight, mask=inside)
    tl.store(indices + target, index.to(tl.int64), mask=inside)
