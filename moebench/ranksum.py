"""Two groups of numbers -> by how much one is shifted, with exact, distribution-free limits. No torch here.

The rank-sum test of Wilcoxon, Mann and Whitney, and the limits that invert it (Hollander, Wolfe and Chicken,
Nonparametric Statistical Methods, 3rd ed., chapter 4). Where both groups are draws of one distribution, of whatever
shape, every order of them is as likely as any other; that gives the distribution of U, the number of pairs in which the
second group's member is greater. Nothing is assumed of the noise: two modes or a disturbed round cost power, never a
false alarm. The price is rounds: the smallest p-value there is, of groups apart, is 1 / C(n + m, n).
"""

import math
from functools import cache
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@cache
def null_tail(num_first: int, num_second: int) -> Floats:
    """P(U <= u) for u = 0 … n·m where both groups are draws of one distribution without ties.

    The orders with U = u are the coefficients of the Gaussian binomial, the product of (1 − q^(m+i)) / (1 − q^i)
    over i = 1 … n.
    """
    size = num_first * num_second + 1
    orders = np.zeros(size, dtype=object)  # Python integers: exact
    orders[0] = 1
    for step in range(1, num_first + 1):
        far = num_second + step
        if far < size:
            orders[far:] -= orders[:-far].copy()
        for start in range(step, size):
            orders[start] += orders[start - step]
    total = math.comb(num_first + num_second, num_first)
    tail: Floats = np.array([int(some) / total for some in np.cumsum(orders)])
    tail.flags.writeable = False
    return tail


def pairwise_shifts(first: ArrayLike, second: ArrayLike) -> Floats:
    """Every difference second − first, ascending."""
    return np.sort(np.subtract.outer(np.asarray(second, float), np.asarray(first, float)), axis=None)


def p_greater(shifts: Floats, num_first: int) -> float:
    """P-value of "the second group is not greater", from `pairwise_shifts`. Ties count against: valid with them too."""
    return float(null_tail(num_first, shifts.size // num_first)[np.count_nonzero(shifts <= 0)])


def p_less(shifts: Floats, num_first: int) -> float:
    """P-value of "the second group is not less"."""
    return float(null_tail(num_first, shifts.size // num_first)[np.count_nonzero(shifts >= 0)])


def lower_limit(shifts: Floats, num_first: int, level: float) -> float:
    """What the shift exceeds, wrong at most so often as `level` says; −inf where the groups are too small for it."""
    rank = _rank(num_first, shifts.size // num_first, level)
    return float(shifts[rank - 1]) if rank else -math.inf


def upper_limit(shifts: Floats, num_first: int, level: float) -> float:
    """What the shift stays below, wrong at most so often as `level` says; inf where the groups are too small for it."""
    rank = _rank(num_first, shifts.size // num_first, level)
    return float(shifts[-rank]) if rank else math.inf


def _rank(num_first: int, num_second: int, level: float) -> int:
    """Which of the ordered shifts, from either end, is the limit of that level; 0 where none is."""
    return int(np.searchsorted(null_tail(num_first, num_second), level, side="right"))


def group_size_needed(level: float) -> int:
    """The size of two equal groups from which on a p-value of `level` is possible."""
    return next(size for size in count(1) if 1 / math.comb(2 * size, size) <= level)
