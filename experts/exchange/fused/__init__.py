"""Move rows between ranks in Triton. The kernels read and write the other ranks' memory at its addresses.

A program of `push` has one token and a stretch of the token's columns: it reads them once and writes them to each of
the token's ranks. A program of `push_back` has one row and a stretch of its columns. A program of `sum_rows` reads the
row of each of a token's ranks and writes the sum once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.exchange import Slabs
from experts.exchange.fused import kernels
from experts.steps.fused.launch import launch

MAX_STRETCH = 1024  # columns of one token per program: 16 bytes of bfloat16 per thread
TILE = 1024  # elements per program where a program copies several rows
MAX_INDICES = 8192  # indices that a program of `kernels.place` reads at a time


def place(slabs: Slabs, indices_TK: Tensor, n_local_experts: int) -> Tensor:
    """As `Exchange.place`."""
    num_tokens, num_choices = indices_TK.shape
    num_ranks = slabs.layout.num_ranks
    row_TP = torch.empty(num_tokens, num_ranks, dtype=torch.int32, device=indices_TK.device)
    choices = triton.next_power_of_2(num_choices)
    block = max(16, MAX_INDICES // choices)
    launch(
        kernels.place,
        (max(1, triton.cdiv(num_tokens, block)), num_ranks),  # without tokens, the ranks must be told so
        *(indices_TK, row_TP, slabs.addresses_P, num_tokens, slabs.rank, n_local_experts),
        COUNTS_AT=_start(slabs, "counts_PP"),
        P=num_ranks,
        K=num_choices,
        CHOICES=choices,
        BLOCK=block,
        num_warps=16,
    )
    return row_TP


def push(
    slabs: Slabs,
    x_TX: Tensor,
    row_TP: Tensor,
    rows_RX: Tensor,
    weights_TK: Tensor | None = None,
    indices_TK: Tensor | None = None,
) -> None:
    """As `Exchange.push`."""
    layout, (num_tokens, width) = slabs.layout, x_TX.shape
    launch(
        kernels.push,
        (num_tokens, triton.cdiv(width, _stretch(width))),
        *(x_TX, row_TP, rows_RX, weights_TK, indices_TK, slabs.addresses_P),
        *(slabs.rank, width, layout.rows_per_slab),
        WITH_CHOICES=weights_TK is not None,
        WEIGHTS_AT=_start(slabs, "weights_RK"),
        INDICES_AT=_start(slabs, "indices_RK"),
        P=layout.num_ranks,
        K=layout.n_activated_experts,
        CHOICES=triton.next_power_of_2(layout.n_activated_experts),
        STRETCH=_stretch(width),
    )


def take_choices(slabs: Slabs) -> tuple[Tensor, Tensor, Tensor]:
    """As `Exchange.take_choices`."""
    own, layout = slabs.own, slabs.layout
    weights_RK = torch.empty_like(own.weights_RK)
    indices_RK = torch.empty_like(own.indices_RK, dtype=torch.int64)
    counts_P = torch.empty_like(own.counts_PP[0])
    rows, columns = _tile(layout.n_activated_experts)
    launch(
        kernels.take_choices,
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


def take_rows(slabs: Slabs, counts_P: Tensor, rows_RX: Tensor) -> None:
    """As `Exchange.take_rows`."""
    num_rows, width = rows_RX.shape
    rows, columns = _tile(width)
    launch(
        kernels.take_rows,
        (triton.cdiv(num_rows, rows), triton.cdiv(width, columns)),
        *(slabs.own.rows_as(rows_RX), rows_RX, counts_P, slabs.rank, slabs.layout.rows_per_slab, num_rows, width),
        ROWS=rows,
        COLUMNS=columns,
    )


def push_back(slabs: Slabs, y_RD: Tensor, counts_P: Tensor, weights_RK: Tensor | None = None) -> None:
    """As `Exchange.push_back`."""
    layout = slabs.layout
    launch(
        kernels.push_back,
        (layout.num_rows, triton.cdiv(layout.dim, _stretch(layout.dim))),
        *(y_RD, weights_RK, counts_P, slabs.addresses_P, slabs.rank, layout.dim, layout.rows_per_slab),
        WITH_WEIGHTS=weights_RK is not None,
        WEIGHTS_AT=_start(slabs, "weights_RK"),
        K=layout.n_activated_experts,
        CHOICES=triton.next_power_of_2(layout.n_activated_experts),
        STRETCH=_stretch(layout.dim),
    )


def sum_rows(
    slabs: Slabs, row_TP: Tensor, y_RD: Tensor, weights_RK: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `Exchange.sum_rows`."""
    layout, num_tokens = slabs.layout, row_TP.shape[0]
    sums_TD = torch.empty(num_tokens, layout.dim, dtype=layout.dtype, device=row_TP.device)
    weights_TK = None
    if weights_RK is not None:
        shape = num_tokens, layout.n_activated_experts
        weights_TK = torch.empty(shape, dtype=layout.weights_dtype, device=row_TP.device)
    launch(
        kernels.sum_rows,
        (num_tokens, triton.cdiv(layout.dim, _stretch(layout.dim))),
        *(sums_TD, weights_TK, row_TP, _aligned(y_RD), _aligned(weights_RK), slabs.own.rows_RD, slabs.own.weights_RK),
        *(slabs.rank, layout.dim, layout.rows_per_slab),
        WITH_WEIGHTS=weights_RK is not None,
        SUM=_sum_type(layout.dtype),
        WEIGHTS_SUM=_sum_type(layout.weights_dtype),
        P=layout.num_ranks,
        K=layout.n_activated_experts,
        CHOICES=triton.next_power_of_2(layout.n_activated_experts),
        STRETCH=_stretch(layout.dim),
    )
    return sums_TD, weights_TK


def _aligned(rows_RX: Tensor | None) -> Tensor | None:
    """Return rows in memory that starts at a multiple of 16 bytes, as the region's parts do."""
    return rows_RX if rows_RX is None or rows_RX.data_ptr() % 16 == 0 else rows_RX.clone()


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
