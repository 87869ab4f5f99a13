"""Two groups of numbers -> the shift between them, with exact, distribution-free limits.

The test is the rank-sum test of Wilcoxon, Mann and Whitney, with the limits that invert it (Hollander, Wolfe and
Chicken, Nonparametric Statistical Methods, 3rd ed., chapter 4). For numbers in blocks it is van Elteren's test (1960)
with equal weights, which compares only numbers of the same block.

If both groups of a block are drawn from one distribution of any shape, all orders of their members are equally likely.
This gives the distribution of U, the number of pairs in which the member of the second group is greater.

The test assumes nothing about the noise. Two modes or a disturbed round may hide a change, but they do not cause a
false alarm. A disturbance that all members of a block share does neither. The price is many rounds: for groups of n
and m members that do not overlap, the smallest possible p-value is 1 / C(n + m, n). For several blocks it is the
product over the blocks.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shifts:
    """All differences second − first within the blocks, ascending, and P(U <= u) for u = 0 … their number."""

    values: Floats
    null_tail: Floats

    @classmethod
    def within(cls, *blocks: tuple[ArrayLike, ArrayLike]) -> "Shifts":
        """Return the shifts from the first to the second group of each block. A block with an empty group adds none."""
        values = [np.subtract.outer(np.asarray(second, float), np.asarray(first, float)) for first, second in blocks]
        return cls(np.sort(np.concatenate([some.ravel() for some in values])), null_tail(some.shape for some in values))

    @property
    def center(self) -> float:
        """The estimate of Hodges and Lehmann: the median of all differences."""
        return float(np.median(self.values))

    @property
    def p_greater(self) -> float:
        """P-value of "the second group is not greater". A tie raises the p-value, so that the test stays valid."""
        return float(self.null_tail[np.count_nonzero(self.values <= 0)])

    @property
    def p_less(self) -> float:
        """P-value of "the second group is not less"."""
        return float(self.null_tail[np.count_nonzero(self.values >= 0)])

    def lower_limit(self, level: float) -> float:
        """Return the lower limit of the shift, wrong with probability `level` at most; −inf for too few numbers."""
        rank = self._rank(level)
        return float(self.values[rank - 1]) if rank else -math.inf

    def upper_limit(self, level: float) -> float:
        """Return the upper limit of the shift, wrong with probability `level` at most; inf for too few numbers."""
        rank = self._rank(level)
        return float(self.values[-rank]) if rank else math.inf

    def _rank(self, level: float) -> int:
        """Return the rank, from either end, of the ordered difference that is the limit of that level; 0 if none is."""
        return int(np.searchsorted(self.null_tail, level, side="right"))


def null_tail(sizes: Iterable[tuple[int, ...]]) -> Floats:
    """Return P(U <= u) for u = 0 … Σ n·m. `sizes` has n and m of each block, with both groups from one distribution."""
    return _null_tail(tuple(sorted(tuple(sorted(size)) for size in sizes)))


@cache
def _null_tail(sizes: tuple[tuple[int, int], ...]) -> Floats:
    orders = np.ones(1, dtype=object)  # Python integers are exact
    for size in sizes:
        orders = np.convolve(orders, _orders(*size))
    total = int(orders.sum())
    tail: Floats = np.array([int(some) / total for some in np.cumsum(orders)])
    tail.flags.writeable = False
    return tail


@cache
def _orders(num_first: int, num_second: int) -> NDArray[np.object_]:
    """Return the number of orders of two groups without ties that have U = u, for u = 0 … n·m.

    These are the coefficients of the Gaussian binomial, the product of (1 − q^(m+i)) / (1 − q^i) over i = 1 … n.
    """
    size = num_first * num_second + 1
    orders = np.zeros(size, dtype=object)
    orders[0] = 1
    for step in range(1, num_first + 1):
        far = num_second + step
        if far < size:
            orders[far:] -= orders[:-far].copy()
        for start in range(step, size):
            orders[start] += orders[start - step]
    return orders


def group_size_needed(level: float) -> int:
    """Return the smallest size of two equal groups for which a p-value of `level` is possible."""
    return next(size for size in count(1) if 1 / math.comb(2 * size, size) <= level)


def blocks_needed(level: float, group_size: int) -> int:
    """Return the smallest number of blocks, of two groups of that size, for which a p-value of `level` is possible."""
    orders = math.comb(2 * group_size, group_size)
    return next(blocks for blocks in count(1) if orders**-blocks <= level)
