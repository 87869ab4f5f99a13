"""Two groups of numbers -> by how much one is shifted, with exact, distribution-free limits. No torch here.

The rank-sum test of Wilcoxon, Mann and Whitney, and the limits that invert it (Hollander, Wolfe and Chicken,
Nonparametric Statistical Methods, 3rd ed., chapter 4); of numbers in blocks, van Elteren's (1960) with equal weights,
which compares within blocks alone. Where both groups of a block are draws of one distribution, of whatever shape, every
order of them is as likely as any other; that gives the distribution of U, the number of pairs in which the second
group's member is greater. Nothing is assumed of the noise: two modes or a disturbed round cost power, never a false
alarm, and neither does what a whole block has in common. The price is numbers: the smallest p-value there is, of groups
apart, is 1 / C(n + m, n), over blocks the product of that.
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
    """Every difference second − first within a block, ascending, and P(U <= u) for u = 0 … their number."""

    values: Floats
    null_tail: Floats

    @classmethod
    def within(cls, *blocks: tuple[ArrayLike, ArrayLike]) -> "Shifts":
        """Of a first and a second group in each block; blocks that lack one say nothing."""
        values = [np.subtract.outer(np.asarray(second, float), np.asarray(first, float)) for first, second in blocks]
        return cls(np.sort(np.concatenate([some.ravel() for some in values])), null_tail(some.shape for some in values))

    @property
    def center(self) -> float:
        """The estimate of Hodges and Lehmann: their median."""
        return float(np.median(self.values))

    @property
    def p_greater(self) -> float:
        """P-value of "the second group is not greater". Ties count against: valid with them too."""
        return float(self.null_tail[np.count_nonzero(self.values <= 0)])

    @property
    def p_less(self) -> float:
        """P-value of "the second group is not less"."""
        return float(self.null_tail[np.count_nonzero(self.values >= 0)])

    def lower_limit(self, level: float) -> float:
        """What the shift exceeds, wrong at most so often as `level` says; −inf where there are too few numbers."""
        rank = self._rank(level)
        return float(self.values[rank - 1]) if rank else -math.inf

    def upper_limit(self, level: float) -> float:
        """What the shift stays below, wrong at most so often as `level` says; inf where there are too few numbers."""
        rank = self._rank(level)
        return float(self.values[-rank]) if rank else math.inf

    def _rank(self, level: float) -> int:
        """Which of the ordered shifts, from either end, is the limit of that level; 0 where none is."""
        return int(np.searchsorted(self.null_tail, level, side="right"))


def null_tail(sizes: Iterable[tuple[int, ...]]) -> Floats:
    """P(U <= u) for u = 0 … Σ n·m where both groups of each block, of n and m, are draws of one distribution."""
    return _null_tail(tuple(sorted(tuple(sorted(size)) for size in sizes)))


@cache
def _null_tail(sizes: tuple[tuple[int, int], ...]) -> Floats:
    orders = np.ones(1, dtype=object)  # Python integers: exact
    for size in sizes:
        orders = np.convolve(orders, _orders(*size))
    total = int(orders.sum())
    tail: Floats = np.array([int(some) / total for some in np.cumsum(orders)])
    tail.flags.writeable = False
    return tail


@cache
def _orders(num_first: int, num_second: int) -> NDArray[np.object_]:
    """The orders of two groups without ties that have U = 0 … n·m.

    They are the coefficients of the Gaussian binomial, the product of (1 − q^(m+i)) / (1 − q^i) over i = 1 … n.
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
    """The size of two equal groups from which on a p-value of `level` is possible."""
    return next(size for size in count(1) if 1 / math.comb(2 * size, size) <= level)


def blocks_needed(level: float, group_size: int) -> int:
    """The number of blocks of two groups of that size from which on a p-value of `level` is possible."""
    orders = math.comb(2 * group_size, group_size)
    return next(blocks for blocks in count(1) if orders**-blocks <= level)
