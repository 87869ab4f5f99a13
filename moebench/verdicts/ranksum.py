"""Estimate the shift between two groups of numbers, with exact limits that hold for any distribution.

The test is the rank-sum test of Wilcoxon, Mann and Whitney. The limits are the shifts that the test does not reject
(Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, 3rd ed., chapter 4). If the numbers are in blocks, the
test is van Elteren's (1960) with equal weights, which compares only numbers of the same block.

If both groups of a block are drawn from one distribution of any shape, all orders of their members are equally likely.
This gives the distribution of U, the number of pairs in which the member of the second group is greater.

The test assumes nothing about the shape of the noise. Times with two modes, or a disturbed round, may hide a change,
but they do not raise the rate of false alarms. A disturbance that all members of a block share has no effect. The price
is many rounds. The smallest possible p-value of groups of n and m members is 1 / C(n + m, n), and it occurs if the
groups do not overlap. For several blocks, the smallest possible p-value is the product of the smallest p-values of the
blocks.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
#: The probability with which `Shifts.smallest_shift` lets chance hide more of a shift.
_CHANCE = 0.01


@dataclass(frozen=True)
class Shifts:
    """The differences between two groups, within blocks.

    `values`: all differences second − first within the blocks, ascending.
    `null_tail`: P(U <= u) if the groups have the same distribution, for u from 0 to the number of differences.
    """

    values: Floats
    null_tail: Floats

    @classmethod
    def within(cls, *blocks: tuple[ArrayLike, ArrayLike]) -> "Shifts":
        """Return the shifts from the first to the second group of each block. A block with an empty group adds none."""
        values = [np.subtract.outer(np.asarray(second, float), np.asarray(first, float)) for first, second in blocks]
        return cls(np.sort(np.concatenate([some.ravel() for some in values])), null_tail(some.shape for some in values))

    @cached_property
    def center(self) -> float:
        """The estimate of Hodges and Lehmann: the median of all differences."""
        count = len(self.values)
        return float((self.values[(count - 1) // 2] + self.values[count // 2]) / 2) if count else math.nan

    @property
    def p_greater(self) -> float:
        """P-value of "the second group is not greater". A tie raises the p-value, so that the test stays valid."""
        return float(self.null_tail[np.count_nonzero(self.values <= 0)])

    @property
    def p_less(self) -> float:
        """P-value of "the second group is not less"."""
        return float(self.null_tail[np.count_nonzero(self.values >= 0)])

    def exact_level(self, level: float) -> float | None:
        """Return the exact probability, at most `level`, with which each limit at `level` is wrong.

        Return None if the groups are too small for limits at `level`.
        """
        rank = self._rank(level)
        return float(self.null_tail[rank - 1]) if rank else None

    def smallest_shift(self, level: float) -> float:
        """Return the smallest shift that is shown at `level` even if chance is against it.

        The sum has two distances. A shift is shown if the estimate is larger than the distance between the estimate and
        the lower limit at `level`. By chance, an estimate may lie below the true shift. In 99 of 100 comparisons, it
        lies below by less than the distance between the estimate and the lower limit at 1%. A shift by the sum of both
        distances is shown in 95 of 100 comparisons, even if the rounds happen to show less noise than there is.
        """
        return sum(self.center - self.lower_limit(some) for some in (level, _CHANCE))

    def lower_limit(self, level: float) -> float:
        """Return the lower limit of the shift; −inf if the groups are too small.

        The true shift is below the limit with a probability of at most `level`.
        """
        rank = self._rank(level)
        return float(self.values[rank - 1]) if rank else -math.inf

    def upper_limit(self, level: float) -> float:
        """Return the upper limit of the shift; inf if the groups are too small.

        The true shift is above the limit with a probability of at most `level`.
        """
        rank = self._rank(level)
        return float(self.values[-rank]) if rank else math.inf

    def _rank(self, level: float) -> int:
        """Return which difference, counted from either end, is the limit at `level`; 0 if the groups are too small."""
        return int(self.null_tail.searchsorted(level, side="right"))


def null_tail(sizes: Iterable[tuple[int, ...]]) -> Floats:
    """Return P(U <= u) for u = 0 … Σ n·m, if both groups have the same distribution.

    `sizes` has n and m, the numbers of members of the two groups, for each block.
    """
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
    """Return how many orders of two groups of n and m members without ties have U = u, for u = 0 … n·m.

    The numbers are the coefficients of the Gaussian binomial, the product of (1 − q^(m+i)) / (1 − q^i) over i = 1 … n.
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
    """Return the smallest number of blocks for which a p-value of `level` is possible.

    Each block has two groups of `group_size` members.
    """
    orders = math.comb(2 * group_size, group_size)
    return next(blocks for blocks in count(1) if orders**-blocks <= level)
