"""Move rows between ranks in Triton. The kernels read and write the other ranks' memory at its addresses.

A program of push has one token and a stretch of the token's columns: it reads them once and writes them to each of the
token's ranks. A program of pull reads the token's row of each rank and writes the sum once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.exchange import Slabs
from experts.steps.fused.launch import launch

MAX_STRETCH = 1024  # columns of one token per program: 16 bytes of bfloat16 per thread
TILE = 1024  # elements per program where a program copies several rows
MAX_INDICES = 4096  # indices that a program of `_place` reads at a time


def place(slabs: Slabs, indices_TK: Tensor, n_local_experts: int) -> Tensor:
    """As `Exchange.place`."""
    num_tokens, num_choices = indices_TK.shape
    num_ranks = slabs.layout.num_ranks
    row_TP = torch.empty(num_tokens, num_ranks, dtype=torch.int32, device=indices_TK.device)
    choices = triton.next_power_of_2(num_choices)
    launch(
        _place,
        (num_ranks,),
        *(indices_TK, row_TP, slabs.addresses_P, num_tokens, slabs.rank, n_local_experts),
        COUNTS_AT=_start(slabs, "counts_PP"),
        P=num_ranks,
        K=num_choices,
        CHOICES=choices,
        BLOCK=max(16, MAX_INDICES // choices),
        num_warps=8,
    )
    return row_TP


def push(
    slabs: Slabs, x_TD: Tensor, row_TP: Tensor, weights_TK: Tensor | None = None, indices_TK: Tensor | None = None
) -> None:
    """As `Exchange.push`."""
    layout = slabs.layout
    launch(
        _push,
        (x_TD.shape[0], triton.cdiv(layout.dim, _stretch(layout.dim))),
        *(
            x_TD,
            row_TP,
            weights_TK,
            indices_TK,
            slabs.addresses_P,
            layout.dim,
            slabs.own_slab.start,
            layout.rows_per_slab,
        ),
        WITH_CHOICES=weights_TK is not None,
        WEIGHTS_AT=_start(slabs, "weights_RK"),
        INDICES_AT=_start(slabs, "indices_RK"),
        P=layout.num_ranks,
        K=layout.n_activated_experts,
        CHOICES=triton.next_power_of_2(layout.n_activated_experts),
        STRETCH=_stretch(layout.dim),
    )


def take_choices(slabs: Slabs) -> tuple[Tensor, Tensor, Tensor]:
    """As `Exchange.take_choices`."""
    own, layout = slabs.own, slabs.layout
    weights_RK = torch.empty_like(own.weights_RK)
    indices_RK = torch.empty_like(own.indices_RK, dtype=torch.int64)
    counts_P = torch.empty_like(own.counts_PP[0])
    rows, columns = _tile(layout.n_activated_experts)
    launch(
        _take_choices,
        (triton.cdiv(layout.num_rows, rows),),
        *(own.weights_RK, own.indices_RK, own.counts_PP, weights_RK, indices_RK, counts_P),
        *(slabs.rank, layout.rows_per_slab, layout.num_rows),
        P=layout.num_ranks,
        RANKS=triton.next_power_of_2(layout.num_ranks),
        K=layout.n_activated_experts,
        ROWS=rows,
        CHOICES=columns,
    )
    return weights_RK, indices_RK, counts_P


def take_rows(slabs: Slabs, counts_P: Tensor) -> Tensor:
    """As `Exchange.take_rows`. Rows that nobody filled stay unwritten."""
    rows_RD = torch.empty_like(slabs.own.rows_RD)
    _copy(slabs, slabs.own.rows_RD, rows_RD, counts_P)
    return rows_RD


def put(slabs: Slabs, y_RD: Tensor, counts_P: Tensor, weights_RK: Tensor | None = None) -> None:
    """As `Exchange.put`."""
    _copy(slabs, y_RD, slabs.own.rows_RD, counts_P)
    if weights_RK is not None:
        _copy(slabs, weights_RK, slabs.own.weights_RK, counts_P)


def pull(slabs: Slabs, row_TP: Tensor, with_weights: bool) -> tuple[Tensor, Tensor | None]:
    """As `Exchange.pull`."""
    layout, num_tokens = slabs.layout, row_TP.shape[0]
    sums_TD = torch.empty(num_tokens, layout.dim, dtype=layout.dtype, device=row_TP.device)
    weights_TK = None
    if with_weights:
        shape = num_tokens, layout.n_activated_experts
        weights_TK = torch.empty(shape, dtype=layout.weights_dtype, device=row_TP.device)
    launch(
        _pull,
        (num_tokens, triton.cdiv(layout.dim, _stretch(layout.dim))),
        *(sums_TD, weights_TK, row_TP, slabs.addresses_P, layout.dim, slabs.own_slab.start, layout.rows_per_slab),
        WITH_WEIGHTS=with_weights,
        WEIGHTS_AT=_start(slabs, "weights_RK"),
        SUM=_sum_type(layout.dtype),
        WEIGHTS_SUM=_sum_type(layout.weights_dtype),
        P=layout.num_ranks,
        K=layout.n_activated_experts,
        CHOICES=triton.next_power_of_2(layout.n_activated_experts),
        STRETCH=_stretch(layout.dim),
    )
    return sums_TD, weights_TK


def _copy(slabs: Slabs, source_RX: Tensor, target_RX: Tensor, counts_P: Tensor) -> None:
    """Copy the filled rows."""
    num_rows, width = source_RX.shape
    rows, columns = _tile(width)
    launch(
        _copy_filled,
        (triton.cdiv(num_rows, rows), triton.cdiv(width, columns)),
        *(source_RX, target_RX, counts_P, slabs.layout.rows_per_slab, num_rows, width),
        ROWS=rows,
        COLUMNS=columns,
    )


def _start(slabs: Slabs, part: str) -> int:
    return slabs.layout.parts[part][0]


def _stretch(dim: int) -> int:
    stretch: int = min(MAX_STRETCH, triton.next_power_of_2(dim))
    return stretch


def _tile(width: int) -> tuple[int, int]:
    columns = min(TILE, triton.next_power_of_2(width))
    return TILE // columns, columns


def _sum_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype is torch.float64 else tl.float32


@triton.jit
def _part(addresses, rank, START: tl.constexpr, DTYPE: tl.constexpr):
    """Return the pointer to a part of a rank's region. As its alignment is known, Triton moves 16 bytes at a time."""
    return tl.multiple_of((tl.load(addresses + rank) + START).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _place(
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
    """Number the tokens that go to one rank, and tell all ranks how many they are. Each program has one rank."""
    to = tl.program_id(0)
    choice = tl.arange(0, CHOICES)
    count = tl.zeros([1], dtype=tl.int32)
    start = 0
    while start < num_tokens:
        token = start + tl.arange(0, BLOCK)
        valid = token < num_tokens
        where = token.to(tl.int64)[:, None] * K + choice[None, :]
        expert = tl.load(indices + where, mask=valid[:, None] & (choice < K)[None, :], other=-1)
        local = expert - to.to(tl.int64) * n_local_experts
        goes = tl.max(((local >= 0) & (local < n_local_experts)).to(tl.int32), axis=1)
        row = tl.where(goes > 0, count + tl.cumsum(goes, 0) - 1, -1)
        tl.store(rows + token.to(tl.int64) * P + to, row, mask=valid)
        count += tl.sum(goes, 0)
        start += BLOCK
    for reader in tl.static_range(P):
        counts = _part(addresses, reader, COUNTS_AT, tl.int32)
        tl.store(counts + rank * P + to + tl.arange(0, 1), count)


@triton.jit
def _push(
    x,
    rows,
    weights,
    indices,
    addresses,
    dim,
    first_row,
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
        at = first_row + row.to(tl.int64)
        target = _part(addresses, to, 0, x.dtype.element_ty)
        tl.store(target + at * dim + columns, values, mask=(columns < dim) & fits)
        if WITH_CHOICES:
            target_weights = _part(addresses, to, WEIGHTS_AT, weights.dtype.element_ty)
            tl.store(target_weights + at * K + choice, weight, mask=is_choice & fits)
            target_indices = _part(addresses, to, INDICES_AT, tl.int32)
            tl.store(target_indices + at * K + choice, index, mask=is_choice & fits)


@triton.jit
def _pull(
    sums,
    weights,
    rows,
    addresses,
    dim,
    first_row,
    rows_per_slab,
    WITH_WEIGHTS: tl.constexpr,
    WEIGHTS_AT: tl.constexpr,
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
        at = first_row + row.to(tl.int64)
        part = _part(addresses, source, 0, sums.dtype.element_ty)
        total += tl.load(part + at * dim + columns, mask=(columns < dim) & has, other=0.0).to(SUM)
        if WITH_WEIGHTS:
            weights_part = _part(addresses, source, WEIGHTS_AT, weights.dtype.element_ty)
            weights_total += tl.load(weights_part + at * K + choice, mask=is_choice & has, other=0.0).to(WEIGHTS_SUM)
    tl.store(sums + token * dim + columns, total.to(sums.dtype.element_ty), mask=columns < dim)
    if WITH_WEIGHTS:
        tl.store(weights + token * K + choice, weights_total.to(weights.dtype.element_ty), mask=is_choice)


@triton.jit
def _take_choices(
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
def _copy_filled(
    source,
    target,
    counts,
    rows_per_slab,
    num_rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slab = row // rows_per_slab
    count = tl.load(counts + slab, mask=row < num_rows, other=0)
    filled = row - slab * rows_per_slab < count
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = filled[:, None] & (columns < width)[None, :]
    where = row.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(target + where, tl.load(source + where, mask=inside, other=0.0), mask=inside)
