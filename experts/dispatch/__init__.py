"""Token dispatchers, one a file: they carry tokens to the ranks that hold their experts, and the results back.

A dispatcher keeps no state between the two: what `combine` needs travels in `Dispatched`.
"""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Dispatched:
    """What this rank's experts compute on: R rows of tokens, each with its K choices.

    `indices_RK` are indices of all experts; −1, and experts of other ranks, contribute nothing here. `origin` is the
    dispatcher's own: how the rows come back.
    """

    x_RD: Tensor
    weights_RK: Tensor
    indices_RK: Tensor
    origin: Any = None


class Dispatcher(Protocol):
    """The contract of a token dispatcher. Both ways are differentiable in tokens and routing weights."""

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        """Send tokens [T, D], routing weights [T, K] and int64 indices [T, K] (−1: none) to where their experts are."""

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Sum [T, D], on the rank a token came from, of what every rank's experts made of it."""


class Local:
    """One process: every expert is here."""

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        """The tokens as they are."""
        return Dispatched(x_TD, weights_TK, indices_TK)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """The sums as they are."""
        return y_RD


class OverGroup:
    """A dispatcher over a process group, which nothing can copy: a layer's copy has it too."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "OverGroup":
        return copy.copy(self)
