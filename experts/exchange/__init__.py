"""Exchange rows of tokens between ranks through memory that all ranks of a group read and write.

Every rank has a region of memory. A region has P slabs, one for each rank, and each slab has room for C rows. A rank
writes only into its own slab of each other rank's region, so it can send rows before it knows how many rows the other
ranks send. Token t goes to row `row_TP[t, p]` of this rank's slab in the region of rank p. The rows of a slab are
filled from the first row on, in the order of the tokens.

Rows travel in two ways. A push sends tokens' rows out. A push back returns a row for each row that came: rank p writes
the result of row r of rank q's slab to row r of its own slab in the region of rank q. Then rank q sums the rows of each
of its tokens. The rows that a rank sends to itself do not travel: a push writes them where the rank wants them, and the
sum reads them where the rank has them.

Ranks write into each other's regions, and each rank reads only its own: over NVLink, writing is faster than reading.

The functions that move rows have two implementations. `eager` is plain torch: it defines what each function does, and
it runs on a CPU, where the ranks are processes that share memory. `fused` is Triton, for GPUs that reach each other's
memory: no function waits for the device, and a captured CUDA graph can replay with another routing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

#: Parts of a region start at multiples of this number, which allows the widest loads and stores.
ALIGNMENT_BYTES = 256
#: Indices travel as int32. Larger indices become this one, which also is not an expert of any layer.
MAX_INDEX = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Layout:
    """The sizes and dtypes of a region. It holds R = P·C rows, in P slabs of C rows."""

    num_ranks: int
    rows_per_slab: int
    dim: int
    n_activated_experts: int
    dtype: torch.dtype
    weights_dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        """The number of rows of a region, R."""
        return self.num_ranks * self.rows_per_slab

    @cached_property
    def parts(self) -> dict[str, tuple[int, tuple[int, int], torch.dtype]]:
        """The first byte, the shape and the dtype of each part of a region, by the field's name in `Region`."""
        choices = self.num_rows, self.n_activated_experts
        shapes: dict[str, tuple[tuple[int, int], torch.dtype]] = {
            "rows_RD": ((self.num_rows, self.dim), self.dtype),
            "weights_RK": (choices, self.weights_dtype),
            "indices_RK": (choices, torch.int32),
            "counts_PP": ((self.num_ranks, self.num_ranks), torch.int32),
        }
        parts, end = {}, 0
        for name, ((height, width), dtype) in shapes.items():
            parts[name] = end, (height, width), dtype
            end += -(-height * width * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return parts

    @property
    def num_bytes(self) -> int:
        """The size of a region."""
        start, shape, dtype = self.parts["counts_PP"]
        return start + shape[0] * shape[1] * dtype.itemsize


@dataclass(frozen=True)
class Region:
    """The memory of one rank, which all ranks can read and write.

    `counts_PP[p, q]` is the number of tokens that rank p wants to send to rank q. The number may be larger than a slab.
    """

    rows_RD: Tensor
    weights_RK: Tensor
    indices_RK: Tensor  # int32
    counts_PP: Tensor  # int32

    @classmethod
    def over(cls, memory: Tensor, layout: Layout) -> "Region":
        """Return the region in `memory`, which is [layout.num_bytes] uint8."""
        views = {}
        for name, (start, (height, width), dtype) in layout.parts.items():
            part = memory[start : start + height * width * dtype.itemsize]
            views[name] = part.view(dtype).view(height, width)
        return cls(**views)

    def rows_as(self, tokens_TX: Tensor) -> Tensor:
        """Return the memory of the rows as [R, X], in the dtype of tokens [T, X] that take no more bytes than a row."""
        num_rows, width = self.rows_RD.shape[0], tokens_TX.shape[1]
        num_bytes = num_rows * width * tokens_TX.itemsize
        return self.rows_RD.view(-1).view(torch.uint8)[:num_bytes].view(tokens_TX.dtype).view(num_rows, width)


@dataclass(frozen=True)
class Slabs:
    """The regions of all ranks, as one rank sees them.

    `barrier` returns when all ranks have called it; on a GPU, the device waits and the host goes on. Every exchange has
    two barriers. Before the first one, no rank writes. Between the two, ranks write into each other's regions, and no
    rank reads. After the second one, each rank reads its own region. So no rank overwrites what another rank still
    reads: a rank reaches the first barrier of the next exchange only after its own reads.
    """

    layout: Layout
    rank: int
    regions: tuple[Region, ...]
    addresses_P: Tensor  # int64: the address of each rank's region, as this rank's device sees it
    barrier: Callable[[], None]
    owner: object = None  # keeps the memory mapped

    @property
    def own(self) -> Region:
        """This rank's region."""
        return self.regions[self.rank]

    def slab(self, rank: int) -> slice:
        """The rows of a rank's slab in every region."""
        first = rank * self.layout.rows_per_slab
        return slice(first, first + self.layout.rows_per_slab)

    @property
    def own_slab(self) -> slice:
        """The rows of this rank's slab in every region."""
        return self.slab(self.rank)


class Exchange(Protocol):
    """The functions that move rows. T tokens of this rank, K choices, P ranks, C rows a slab, R = P·C rows a region."""

    def place(self, slabs: Slabs, indices_TK: Tensor, n_local_experts: int) -> Tensor:
        """Return `row_TP`, the row of each token in this rank's slab of each rank's region; −1: the token stays away.

        A token goes once to each rank that holds one of its experts. The result is int32, and may be C or more if a
        slab is too small. The function tells all ranks in `counts_PP` how many rows this rank wants to send.
        """

    def push(
        self,
        slabs: Slabs,
        x_TX: Tensor,
        row_TP: Tensor,
        rows_RX: Tensor,
        weights_TK: Tensor | None = None,
        indices_TK: Tensor | None = None,
    ) -> None:
        """Write each token's row, and its routing weights and indices if given, into the regions of its ranks.

        The tokens may have another width and dtype than the regions' rows, but no more bytes (`Region.rows_as`). The
        rows for this rank itself go into `rows_RX`, which may be the rows of its region. A row that does not fit into
        its slab is not written.
        """

    def take_choices(self, slabs: Slabs) -> tuple[Tensor, Tensor, Tensor]:
        """Return routing weights [R, K], int64 indices [R, K] and counts [P] that were pushed into this rank's region.

        A row that nobody filled has indices of −1 and weights of zero. The counts are the filled rows of each slab.
        """

    def take_rows(self, slabs: Slabs, counts_P: Tensor, rows_RX: Tensor) -> None:
        """Copy the rows that other ranks pushed from this rank's region into `rows_RX`. Other rows stay as they are.

        `rows_RX` has the width and dtype of the tokens that were pushed.
        """

    def push_back(self, slabs: Slabs, y_RD: Tensor, counts_P: Tensor, weights_RK: Tensor | None = None) -> None:
        """Write the results of other ranks' rows, and weights if given, into this rank's slabs of their regions."""

    def sum_rows(
        self, slabs: Slabs, row_TP: Tensor, y_RD: Tensor, weights_RK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the sum [T, D] of each token's rows over all ranks and, with weights, the sum [T, K] of the weights.

        `y_RD` and `weights_RK` are what this rank has pushed back: the rows of its own tokens are read there. Sums are
        in float32 (float64 for float64), in the order of the ranks. A token without rows has zeros.
        """


def exchange_on(device: torch.device) -> Exchange:
    """Return the functions for tensors on a device."""
    if device.type == "cuda":
        from experts.exchange import fused

        return fused
    from experts.exchange import eager

    return eager
