"""Rounds of two sides -> verdicts on time, over a whole family of cases at once. No torch here.

The unit that repeats is a round, a fresh process: a side of a case is the median time of each of its rounds. Ratios are
candidate over baseline, above 1 slower, and are estimated by the median over all pairs of rounds (Hodges and Lehmann).

    REGRESSED     shown to be slower, and a slowdown by the threshold or more is not excluded
    IMPROVED      shown to be faster, and a speedup by the threshold or more is not excluded
    PASS          a slowdown by the threshold is excluded, and would have been seen
    INCONCLUSIVE  neither: the noise is too large for the threshold, or there are too few rounds

*Shown* is exact: rank-sum tests (moebench.verdicts.ranksum) with Holm's correction over the family, so that a family in
which nothing changed has a false REGRESSED at most so often as `FALSE_ALARMS` says, whatever the noise looks like, as
long as the rounds of both sides are exchangeable, or those that were measured together; IMPROVED likewise. *Excluded*
is by the upper end of a case's own interval: a case slower by the threshold passes at most so often as `WRONG_PASSES`
says. *Would have been seen*: `smallest_effect` is at most the threshold. The threshold is thus the smallest slowdown
that must not pass, not one beyond which the estimate has to lie: of a slowdown by exactly the threshold, half the
estimates lie below it.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from moebench.results.stats import THRESHOLD
from moebench.verdicts.ranksum import Shifts, group_size_needed
from moebench.verdicts.verdict import Verdict

Key = TypeVar("Key", bound=Hashable)

#: Half of the 1% that a gate may have: the tests are exact, what is left is for rounds that are not quite exchangeable.
FALSE_ALARMS = 0.005
WRONG_PASSES = 0.01
#: Of `smallest_effect`: how often a slowdown so large is found, at least.
POWER = 0.95
#: A round more or less of one process says nothing about how processes differ.
MIN_ROUNDS = 2


@dataclass(frozen=True)
class Sides:
    """The median time of each round of one case, in ms.

    `blocks`, where rounds of both sides were measured together, block by block: the block of each of the baseline's and
    of each of the candidate's. Only rounds of one block are compared then.
    """

    baseline_ms: tuple[float, ...]
    candidate_ms: tuple[float, ...]
    blocks: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def shifts(self) -> Shifts:
        """Candidate over baseline, on the logarithmic scale."""
        sides = np.log(self.baseline_ms), np.log(self.candidate_ms)
        if self.blocks is None:
            return Shifts.within(sides)
        of_one, of_two = (np.asarray(some) for some in self.blocks)
        return Shifts.within(*((sides[0][of_one == block], sides[1][of_two == block]) for block in np.unique(of_one)))

    @property
    def rounds(self) -> tuple[int, int]:
        return len(self.baseline_ms), len(self.candidate_ms)


@dataclass(frozen=True)
class TimeVerdict:
    """What is known about the time of one case; ratios are candidate / baseline, above 1 slower.

    `low` and `high`: each end of the interval is wrong at most 1 time in 100, infinite where there are too few rounds.
    `p_slower`, `p_faster`: of this case alone, before Holm's correction. `smallest_effect`: the smallest slowdown, as
    a share (0.03: 3%), that this comparison, with the noise it met, would have shown with a probability of 95% or more;
    inf where it could have shown none.
    """

    verdict: Verdict
    reason: str
    ratio: float
    low: float
    high: float
    p_slower: float
    p_faster: float
    smallest_effect: float
    rounds: tuple[int, int]


def round_medians(samples_ms: ArrayLike, sample_rounds: ArrayLike) -> dict[int, float]:
    """The median of each round's samples by its number, ascending."""
    samples, rounds = np.asarray(samples_ms, float), np.asarray(sample_rounds)
    return {int(number): float(np.median(samples[rounds == number])) for number in np.unique(rounds)}


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which of the hypotheses are rejected, so that any is wrongly rejected at most so often as `level` says."""
    rejected = [False] * len(p_values)
    for position, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[number] > level / (len(p_values) - position):
            break
        rejected[number] = True
    return rejected


def judge_times(
    family: Mapping[Key, Sides],
    threshold: float = THRESHOLD,
    false_alarms: float = FALSE_ALARMS,
    wrong_passes: float = WRONG_PASSES,
) -> dict[Key, TimeVerdict]:
    """The verdict on each case of a family, false alarms controlled over all of it together.

    A test that is looked at several times, with more rounds each time, shares `false_alarms` and `wrong_passes` out
    among the looks (moebench.verdicts.looks) and judges the whole family at each. A case with one round on a side is no
    test, and is not counted in the family.
    """
    tested = {key: _Comparison(sides) for key, sides in family.items() if min(sides.rounds) >= MIN_ROUNDS}
    slower = dict(zip(tested, holm([test.p_slower for test in tested.values()], false_alarms), strict=True))
    faster = dict(zip(tested, holm([test.p_faster for test in tested.values()], false_alarms), strict=True))
    level = false_alarms / max(1, len(tested))
    return {
        key: tested[key].verdict(slower[key], faster[key], threshold, level, wrong_passes)
        if key in tested
        else _one_process(sides)
        for key, sides in family.items()
    }


class _Comparison:
    """One case: the shift between its sides on the logarithmic scale."""

    def __init__(self, sides: Sides) -> None:
        self._sides = sides
        self._shifts = shifts = sides.shifts
        self.p_slower, self.p_faster = shifts.p_greater, shifts.p_less

    def verdict(self, slower: bool, faster: bool, threshold: float, level: float, wrong_passes: float) -> TimeVerdict:
        low, high = self._shifts.lower_limit(wrong_passes), self._shifts.upper_limit(wrong_passes)
        floor, smallest = math.log1p(threshold), self._smallest_shift(level)
        if slower and high >= floor:
            verdict, reason = Verdict.REGRESSED, "slower"
        elif faster:
            verdict = Verdict.IMPROVED if low <= -floor else Verdict.PASS
            reason = "faster" if low <= -floor else f"faster, by less than {threshold:.1%}"
        elif slower or (smallest <= floor and high < floor):
            verdict = Verdict.PASS
            reason = f"slower, by less than {threshold:.1%}" if slower else f"not slower by {threshold:.1%}"
        else:
            verdict, reason = Verdict.INCONCLUSIVE, self._why_inconclusive(smallest, threshold, level)
        return TimeVerdict(
            verdict, reason, math.exp(self._shifts.center), math.exp(low), math.exp(high), self.p_slower, self.p_faster,
            math.expm1(smallest), self._sides.rounds,
        )  # fmt: skip

    def _smallest_shift(self, level: float) -> float:
        """The slowdown that lies above what must be exceeded to be shown even where chance is against it.

        To be shown, the estimate must exceed its distance from the lower limit of the family's level; 99 estimates of
        100 lie above the true shift less their distance from the lower limit of 1%. For the promised 95 that is more
        than enough where the noise is known, and enough where it comes out too small by chance.
        """
        return sum(self._shifts.center - self._shifts.lower_limit(some) for some in (level, WRONG_PASSES))

    def _why_inconclusive(self, smallest: float, threshold: float, level: float) -> str:
        one, two = self._sides.rounds
        rounds = f"{one} and {two} rounds"
        if math.isinf(smallest):
            needed = group_size_needed(level)
            remedy = "more" if self._sides.blocks else f"{needed} a side: --rounds {needed}"
            return f"{rounds} can show nothing among so many cases; measure {remedy}"
        if smallest > math.log1p(threshold):
            return f"too noisy to see a slowdown of {threshold:.1%} with {rounds}; measure more"
        return f"slower by {threshold:.1%} is neither shown nor excluded with {rounds}; measure more"


def _one_process(sides: Sides) -> TimeVerdict:
    ratio = math.nan
    if min(sides.rounds):
        ratio = float(np.median(sides.candidate_ms) / np.median(sides.baseline_ms))
    rounds = f"{sides.rounds[0]} and {sides.rounds[1]} rounds"
    reason = f"{rounds}: one process a side says nothing about how processes differ; measure with --rounds"
    return TimeVerdict(Verdict.INCONCLUSIVE, reason, ratio, 0.0, math.inf, 1.0, 1.0, math.inf, sides.rounds)
