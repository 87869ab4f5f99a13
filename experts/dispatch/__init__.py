"""Define what a token dispatcher is. Each dispatcher is one file.

A dispatcher carries tokens to the ranks that hold the tokens' experts, and carries the results back. It keeps no state
between `dispatch` and `combine`. `Dispatched` holds everything that `combine` needs.
"""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Dispatched:
    """The input of this rank's experts: R rows of tokens, each with its K choices.

    `indices_RK` holds expert indices that count the experts of all ranks. Choices of −1 and of other ranks' experts
    contribute nothing on this rank. `origin` is private to the dispatcher, which needs it to send the rows back. It is
    None for `Local`.

    `row_bytes` is the bytes that a row of tokens took on its way, with its scales if it has some. If it is None, these
    are the bytes of a row of `x_RD`.
    """

    x_RD: Tensor
    weights_RK: Tensor
    indices_RK: Tensor
    origin: Any = None
    row_bytes: int | None = None


class Dispatcher(Protocol):
    """The interface of a token dispatcher. Gradients flow through both methods to tokens and routing weights."""

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        """Send tokens [T, D], routing weights [T, K] and int64 indices [T, K] (−1: no expert) to the experts' ranks."""

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Send the experts' results back to each token's rank, and return each token's sum [T, D] over the ranks."""


class Local:
    """The dispatcher of one process, which holds every expert."""

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        """Return the tokens unchanged."""
        return Dispatched(x_TD, weights_TK, indices_TK)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return the sums unchanged."""
        return y_RD


class OverGroup:
    """A dispatcher over a process group. Groups cannot be copied, so a layer and its copy share one group."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "OverGroup":
        return copy.copy(self)
