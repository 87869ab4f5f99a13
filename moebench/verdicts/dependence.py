"""Judge a shift between two groups of rounds if rounds depend on one another, or if whole sessions differ.

The rank-sum test (moebench.verdicts.ranksum) is exact if the rounds of both sides are exchangeable. Two things break
this. A machine that is slow in one round tends to be slow in the next round. And all rounds of one session may share a
shift, because a machine is slower on some days. In both cases the rounds tell less than their number suggests.

This module has two further ways to judge a shift, one for each case. moebench.verdicts.times asks the rank-sum test and
one of the two, and takes the more careful answer. If rounds are exchangeable, the promise of the rank-sum test
therefore holds.

Both ways use Student's distribution, so they assume noise that is roughly normal. The rank-sum test does not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit  # importing scipy.stats would cost every command a second

from moebench.verdicts.ranksum import Floats, Shifts

#: The upper limit of the correlation lies this many standard errors above the estimate. With four standard errors, a
#: gate of 40 jobs whose neighbouring rounds correlate by 0.8 raises fewer than 1% false alarms
#: (tests/moebench/verdicts/test_shapes.py). With three it raises more.
STANDARD_ERRORS = 4.0
#: The fewest rounds of a session that say something about the correlation of neighbours.
MIN_NEIGHBOURS = 3
#: The fewest degrees of freedom with which a spread is known. Up to two, Student's distribution has no variance.
MIN_FREEDOM = 2.0
#: The probability with which each end of the interval around the shift is wrong before it is widened.
_BASE_LEVEL = 0.01
#: The share of a level that goes to the test of whole sessions, as if their shifts were normal.
_NORMAL_SHARE = 0.5
#: If a shift by `smallest_shift` is there, it is missed with this probability.
_MISSED = 0.05


class Evidence(Protocol):
    """One way to judge the shift from the first to the second of two groups of rounds."""

    @property
    def p_greater(self) -> float:
        """P-value of "the second group is not greater"."""

    @property
    def p_less(self) -> float:
        """P-value of "the second group is not less"."""

    def lower_limit(self, level: float) -> float:
        """Return the limit below which the true shift lies with a probability of at most `level`."""

    def upper_limit(self, level: float) -> float:
        """Return the limit above which the true shift lies with a probability of at most `level`."""

    def smallest_shift(self, level: float) -> float:
        """Return the smallest shift that is shown at `level` in 95 of 100 comparisons."""


@dataclass(frozen=True)
class Student:
    """A shift by `center` whose estimate has Student's distribution.

    `below`, `above`: the standard errors of the estimate, for the limit below and the limit above it. `freedom`: the
    degrees of freedom. With fewer than MIN_FREEDOM, the spread is not known: no shift is shown and none is excluded.
    `share`: the share of every level that Student's distribution gets. The rest allows for noise that is not normal.
    """

    center: float
    below: float
    above: float
    freedom: float
    share: float = 1.0

    @property
    def p_greater(self) -> float:
        return self._p(self.center, self.below)

    @property
    def p_less(self) -> float:
        return self._p(-self.center, self.above)

    def _p(self, shift: float, error: float) -> float:
        if not self._is_known:
            return 1.0
        if error == 0:
            return 0.0 if shift > 0 else 1.0
        return min(1.0, float(stdtr(self.freedom, -shift / error)) / self.share)

    def lower_limit(self, level: float) -> float:
        return self.center - self._errors(level) * self.below if self._is_known else -math.inf

    def upper_limit(self, level: float) -> float:
        return self.center + self._errors(level) * self.above if self._is_known else math.inf

    @property
    def _is_known(self) -> bool:
        return self.freedom >= MIN_FREEDOM

    def _errors(self, level: float) -> float:
        return -float(stdtrit(self.freedom, level * self.share))

    def smallest_shift(self, level: float) -> float:
        return sum(self.center - self.lower_limit(some) for some in (level, _MISSED))


@dataclass(frozen=True)
class Neighbours:
    """How much neighbouring rounds of one session may depend on one another.

    `correlation`: the estimate. `num_rounds`: the number of rounds that it comes from; 0 if no session has enough.
    """

    correlation: float
    num_rounds: int

    @classmethod
    def of(cls, sessions: Sequence[Floats]) -> Self:
        """Estimate the correlation from the ranks of the rounds within each session, in the order of measurement.

        For one session it is 1 − v / 2, where v is the rank version of von Neumann's ratio (Bartels, 1982). Its
        expectation is 0 for independent rounds of any distribution, and outliers cannot hide a dependence.
        """
        found = [(len(some), _rank_correlation(some)) for some in sessions if len(some) >= MIN_NEIGHBOURS]
        total = sum(size for size, _ in found)
        return cls(sum(size * some for size, some in found) / total if total else 0.0, total)

    @cached_property
    def limit(self) -> float:
        """The largest correlation that is not excluded, from 0 to 1.

        The arcsine of the estimate has a standard error of 1 / √n, whatever the correlation is.
        """
        if not self.num_rounds:
            return 1.0
        angle = math.asin(self.correlation) + STANDARD_ERRORS / math.sqrt(self.num_rounds)
        return max(0.0, math.sin(min(angle, math.pi / 2)))

    @property
    def widening(self) -> float:
        """The factor by which limits for independent rounds are too narrow at the correlation `limit`.

        The mean of n rounds of a first-order autoregressive series with the correlation r varies like the mean of
        n (1 − r) / (1 + r) independent rounds.
        """
        return math.sqrt((1 + self.limit) / (1 - self.limit)) if self.limit < 1 else math.inf


def _rank_correlation(values: Floats) -> float:
    ranks = _ranks(values)
    spread = float(ranks @ ranks)
    steps = ranks[1:] - ranks[:-1]
    return 1 - float(steps @ steps) / spread / 2 if spread else 0.0


def _ranks(values: Floats) -> Floats:
    """Return the ranks of the values, minus their mean. Equal values share the mean of their ranks."""
    ordered = np.sort(values)
    below, at_most = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return np.asarray((below + at_most - len(values)) / 2)


def widened(shifts: Shifts, neighbours: Neighbours, num_rounds: int) -> Student:
    """Return the evidence of `shifts` if neighbouring rounds correlate as much as `neighbours` does not exclude.

    `num_rounds` is the number of rounds of both sides. The spread of n rounds with the correlation r between neighbours
    is known as well as that of n (1 − r²) / (1 + r²) independent rounds (Bayley and Hammersley, 1946).
    """
    level, center, r = shifts.exact_level(_BASE_LEVEL), shifts.center, neighbours.limit
    freedom = (num_rounds - 2) * (1 - r**2) / (1 + r**2)
    if level is None or r == 1:
        return Student(center, math.inf, math.inf, 0.0)
    scale = neighbours.widening / -float(ndtri(level))
    below, above = center - shifts.lower_limit(_BASE_LEVEL), shifts.upper_limit(_BASE_LEVEL) - center
    return Student(center, scale * below, scale * above, freedom)


def between_sessions(one: Mapping[int, Floats], two: Mapping[int, Floats]) -> Student:
    """Return the evidence of the centres of whole sessions. `one` and `two` have the rounds of a session by its number.

    The sides have three sessions or more together; with three, the spread is not known. The spread between the centres
    of a side's sessions contains all that the rounds of a session share, and the dependence of neighbouring rounds.
    """
    centers = [np.array([np.median(rounds) for rounds in side.values()]) for side in (one, two)]
    freedom = sum(len(some) - 1 for some in centers)
    squares = sum(float(np.sum((some - some.mean()) ** 2)) for some in centers)
    error = math.sqrt(squares / freedom * sum(1 / len(some) for some in centers))
    return Student(float(centers[1].mean() - centers[0].mean()), error, error, float(freedom), _NORMAL_SHARE)


@dataclass(frozen=True)
class MostCareful:
    """The more careful answer of several kinds of evidence to every question."""

    all: tuple[Evidence, ...]

    @property
    def p_greater(self) -> float:
        return max(some.p_greater for some in self.all)

    @property
    def p_less(self) -> float:
        return max(some.p_less for some in self.all)

    def lower_limit(self, level: float) -> float:
        return min(some.lower_limit(level) for some in self.all)

    def upper_limit(self, level: float) -> float:
        return max(some.upper_limit(level) for some in self.all)

    def smallest_shift(self, level: float) -> float:
        return max(some.smallest_shift(level) for some in self.all)
