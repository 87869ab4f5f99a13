"""Give verdicts on time for a whole family of cases at once, from the rounds of a baseline and of a candidate.

A round is a fresh process. A side (the baseline or the candidate) has a list of medians for each case, one median per
round. A ratio is candidate / baseline, so a ratio above 1 means slower. The estimate of the ratio is the median of the
ratios of all pairs of rounds (Hodges and Lehmann).

    REGRESSED     a slowdown is shown, and a slowdown by the threshold or more is not excluded
    IMPROVED      a speedup is shown, and a speedup by the threshold or more is not excluded
    PASS          a slowdown by the threshold is excluded, and the comparison would have seen such a slowdown;
                  or a change is shown, and a change by the threshold is excluded
    INCONCLUSIVE  none of the above: the noise is too large for the threshold, or there are too few rounds

A change is *shown* if an exact rank-sum test (moebench.verdicts.ranksum) shows it, with Holm's correction over the
family. If nothing changed, the probability of one or more REGRESSED in the family is at most `FALSE_ALARMS`, and so is
the probability of one or more IMPROVED. These limits hold for noise of any shape, if the rounds of both sides are
exchangeable. If the rounds were measured together in blocks, it is enough that the rounds of one block are
exchangeable.

Rounds of two stored results are exchangeable only if neither the order of the rounds nor the session matters. `Sides`
with `sessions` say where each round comes from, and moebench.verdicts.dependence then makes p-values larger and
intervals wider: by the dependence of neighbouring rounds that their order does not exclude, or by how much sessions
differ. A comparison that is more careful keeps the limits above. For rounds that depend on one another, the limits are
simulated (moebench.verdicts.shapes).

A change is *excluded* if it lies outside the case's interval (`low` to `high` of `TimeVerdict`). A case that is slower
by the threshold passes with a probability of at most `WRONG_PASSES`.

The comparison *would have seen* a slowdown by the threshold if `smallest_effect` is at most the threshold.

The threshold is therefore the smallest slowdown that must not pass. REGRESSED does not need an estimate above the
threshold, because half of the estimates lie below it if a case is slower by exactly the threshold.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moebench.results.stats import THRESHOLD
from moebench.verdicts.dependence import Evidence, MostCareful, Neighbours, between_sessions, widened
from moebench.verdicts.ranksum import Floats, Shifts, group_size_needed
from moebench.verdicts.verdict import Verdict

Key = TypeVar("Key", bound=Hashable)

_MEASURE_MORE = "measure more, or both revisions together with `moebench ab`"
_LARGEST = 700.0  # e to a larger power may be too large for a float

#: A gate may raise false alarms with a probability of 1%. The exact tests get half of it. The other half allows for
#: rounds that are not quite exchangeable.
FALSE_ALARMS = 0.005
WRONG_PASSES = 0.01
#: The least probability with which a slowdown by `smallest_effect` is found.
POWER = 0.95
#: The fewest rounds on a side. One process does not show how much processes differ.
MIN_ROUNDS = 2


@dataclass(frozen=True)
class Sides:
    """The median times of the rounds of one case, in ms.

    `blocks` is None unless rounds of both sides were measured together, block by block. Then it has the block of each
    baseline round and the block of each candidate round, and only rounds of the same block are compared.

    `sessions` has the session of each baseline round and of each candidate round, and the rounds are then in the order
    of measurement. It is None if the rounds are exchangeable, or exchangeable within their blocks.
    """

    baseline_ms: tuple[float, ...]
    candidate_ms: tuple[float, ...]
    blocks: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    sessions: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def shifts(self) -> Shifts:
        """All shifts from baseline to candidate, as differences of logarithms."""
        sides = np.log(self.baseline_ms), np.log(self.candidate_ms)
        if self.blocks is None:
            return Shifts.within(sides)
        of_one, of_two = (np.asarray(some) for some in self.blocks)
        return Shifts.within(*((sides[0][of_one == block], sides[1][of_two == block]) for block in np.unique(of_one)))

    @property
    def rounds(self) -> tuple[int, int]:
        return len(self.baseline_ms), len(self.candidate_ms)

    @property
    def by_session(self) -> tuple[dict[int, Floats], dict[int, Floats]]:
        """The logarithms of the rounds of each session of the baseline and of the candidate, in order."""
        assert self.sessions is not None, "only sides with sessions have rounds by session"
        logs = np.log(self.baseline_ms), np.log(self.candidate_ms)
        one, two = (
            {number: some[np.asarray(numbers) == number] for number in dict.fromkeys(numbers)}
            for some, numbers in zip(logs, self.sessions, strict=True)
        )
        return one, two


@dataclass(frozen=True)
class TimeVerdict:
    """The verdict on the time of one case. Ratios are candidate / baseline, so a ratio above 1 means slower.

    `ratio`: the estimated ratio; NaN if a side has no rounds.
    `low`, `high`: the ends of the ratio's interval. Each end is wrong with a probability of at most `wrong_passes` (1%
    by default). With too few rounds, `low` is 0 and `high` is infinite.
    `p_slower`, `p_faster`: the p-values of this case, before Holm's correction.
    `smallest_effect`: the smallest slowdown, as a share (0.03 is 3%), that this comparison would have shown with a
    probability of 95% or more, given the noise in its rounds; inf if it could not have shown any slowdown.
    `rounds`: the numbers of rounds of the baseline and of the candidate.
    `sessions`: the numbers of sessions of the baseline and of the candidate; None if sessions do not matter.
    `correlation`: the largest correlation of neighbouring rounds that their order does not exclude. It is None if the
    comparison does not depend on it: if both sides were measured together, or if one has several sessions.
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
    sessions: tuple[int, int] | None = None
    correlation: float | None = None


def round_medians(samples_ms: ArrayLike, sample_rounds: ArrayLike) -> dict[int, float]:
    """Return the median of each round's samples by the round's number, ascending."""
    samples, rounds = np.asarray(samples_ms, float), np.asarray(sample_rounds)
    if np.any(rounds[1:] < rounds[:-1]):
        order = np.argsort(rounds, kind="stable")
        samples, rounds = samples[order], rounds[order]
    found, starts = {}, starts_of_rounds(rounds)
    for start, end in zip(starts, [*starts[1:], len(rounds)], strict=True):
        ordered, size = np.sort(samples[start:end]), end - start
        found[int(rounds[start])] = float((ordered[(size - 1) // 2] + ordered[size // 2]) / 2)
    return found


def starts_of_rounds(rounds: NDArray[Any]) -> list[int]:
    """Return the places where the number of the round is another one than before, the first place included."""
    return [0, *(np.flatnonzero(rounds[1:] != rounds[:-1]) + 1).tolist()] if len(rounds) else []


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Return for each hypothesis whether Holm's procedure rejects it.

    The probability that the procedure rejects one or more true hypotheses is at most `level`.
    """
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
    """Return the verdict on each case of a family.

    `threshold` is a share. `false_alarms` is the largest probability of one or more false alarms in the whole family.
    `wrong_passes` is the largest probability that a case which is slower by the threshold passes. A caller that looks
    several times, with more rounds each time, must divide both probabilities among the looks, and must pass the whole
    family at each look (moebench.verdicts.looks). A case with fewer than `MIN_ROUNDS` rounds on a side is not tested
    and does not count in the family.
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
    """The comparison of the two sides of one case, on the logarithmic scale."""

    def __init__(self, sides: Sides) -> None:
        self._sides = sides
        self._shifts = shifts = sides.shifts
        self._sessions: tuple[int, int] | None = None
        self._neighbours: Neighbours | None = None
        self._evidence: Evidence = shifts
        if sides.sessions is not None:
            one, two = sides.by_session
            self._sessions = len(one), len(two)
            if sum(self._sessions) > 2:
                careful = between_sessions(one, two)
            else:
                self._neighbours = Neighbours.of([*one.values(), *two.values()])
                careful = widened(shifts, self._neighbours, sum(sides.rounds))
            self._evidence = MostCareful((shifts, careful))
        self.p_slower, self.p_faster = self._evidence.p_greater, self._evidence.p_less

    def verdict(self, slower: bool, faster: bool, threshold: float, level: float, wrong_passes: float) -> TimeVerdict:
        low, high = self._evidence.lower_limit(wrong_passes), self._evidence.upper_limit(wrong_passes)
        floor, smallest = math.log1p(threshold), self._evidence.smallest_shift(level)
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
            verdict, reason, _exp(self._shifts.center), _exp(low), _exp(high), self.p_slower, self.p_faster,
            _exp(smallest) - 1, self._sides.rounds, self._sessions,
            None if self._neighbours is None else self._neighbours.limit,
        )  # fmt: skip

    def _why_inconclusive(self, smallest: float, threshold: float, level: float) -> str:
        one, two = self._sides.rounds
        rounds = f"{one} and {two} rounds"
        independent = self._shifts.smallest_shift(level)
        if math.isinf(independent):
            needed = group_size_needed(level)
            remedy = "more" if self._sides.blocks else f"{needed} on each side: --rounds {needed}"
            return f"{rounds} are too few to show a change among so many cases; measure {remedy}"
        if math.isinf(smallest) or smallest > math.log1p(threshold) >= independent:
            return f"{self._why_wider()} to see a slowdown of {threshold:.1%} with {rounds}; {_MEASURE_MORE}"
        if smallest > math.log1p(threshold):
            return f"too noisy to see a slowdown of {threshold:.1%} with {rounds}; measure more"
        return f"a slowdown of {threshold:.1%} is neither shown nor excluded with {rounds}; measure more"

    def _why_wider(self) -> str:
        if self._sessions is not None and self._neighbours is None:
            return f"{self._sessions[0]} and {self._sessions[1]} sessions are too few or differ too much"
        assert self._neighbours is not None, "only dependence and sessions make an interval wider"
        if math.isinf(self._evidence.smallest_shift(WRONG_PASSES)):
            return (
                "neighbouring rounds are too much alike, or too few, to tell how far they depend on one another, and so"
            )
        return f"rounds may depend on one another (neighbours correlate by up to {self._neighbours.limit:.2f}) too much"


def _exp(value: float) -> float:
    """Return e to the power of `value`; inf if that is too large for a float."""
    return math.exp(value) if value < _LARGEST else math.inf


def _one_process(sides: Sides) -> TimeVerdict:
    ratio = math.nan
    if min(sides.rounds):
        ratio = float(np.median(sides.candidate_ms) / np.median(sides.baseline_ms))
    rounds = f"{sides.rounds[0]} and {sides.rounds[1]} rounds"
    reason = f"{rounds}: one process on a side does not show how much processes differ; measure more with --rounds"
    return TimeVerdict(Verdict.INCONCLUSIVE, reason, ratio, 0.0, math.inf, 1.0, 1.0, math.inf, sides.rounds)
