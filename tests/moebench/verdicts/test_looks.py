"""Jobs are measured until they are decided. Stopping early raises no more false alarms than the gate allows."""

import math

import numpy as np
import pytest

from moebench.results.stats import THRESHOLD
from moebench.verdicts.looks import LOOK_FALSE_ALARMS, LOOK_WRONG_PASSES, NUM_LOOKS, schedule, until_decided
from moebench.verdicts.times import FALSE_ALARMS, WRONG_PASSES, Sides, judge_times
from moebench.verdicts.verdict import Verdict

PASS, REGRESSED, INCONCLUSIVE = Verdict.PASS, Verdict.REGRESSED, Verdict.INCONCLUSIVE


@pytest.mark.parametrize("family_size", [1, 2, 56, 200])
def test_the_first_look_is_the_first_that_can_show_anything(family_size):
    looks = schedule(family_size)
    assert [rounds / looks[0] for rounds in looks] == [1, 2, 4]

    def shown(rounds):  # every process of the candidate is slower than all of the baseline
        blocks = (tuple(run // 2 for run in range(2 * rounds)),) * 2
        apart = Sides((1.0,) * 2 * rounds, (9.0,) * 2 * rounds, blocks)
        alike = {number: Sides((1.0,) * 2 * rounds, (1.0,) * 2 * rounds, blocks) for number in range(family_size - 1)}
        found = judge_times({"slow": apart, **alike}, THRESHOLD, LOOK_FALSE_ALARMS, LOOK_WRONG_PASSES)
        return found["slow"].verdict is REGRESSED

    assert shown(looks[0])
    assert not shown(looks[0] - 1)


class Script:
    """Return the given verdicts, one set per look, and note in `measured` the jobs and rounds that were requested."""

    def __init__(self, *verdicts, time_for=9):
        self._verdicts, self._time_for, self.measured = list(verdicts), time_for, []

    def measure(self, undecided, rounds):
        self.measured.append(("".join(undecided), *rounds))
        return len(self.measured) < self._time_for

    def judge(self):
        return dict(zip("xyz", self._verdicts.pop(0), strict=True))


def test_only_what_is_undecided_goes_on():
    script = Script(
        (PASS, INCONCLUSIVE, INCONCLUSIVE), (PASS, REGRESSED, INCONCLUSIVE), (PASS, REGRESSED, INCONCLUSIVE)
    )
    assert list(until_decided("xyz", (2, 3, 5), script.measure, script.judge)) == [2, 3, 5]
    assert script.measured == [("xyz", 0, 1), ("yz", 2), ("z", 3, 4)]


def test_it_ends_when_all_is_decided():
    script = Script((PASS, PASS, REGRESSED))
    assert list(until_decided("xyz", (2, 3, 5), script.measure, script.judge)) == [2]
    assert script.measured == [("xyz", 0, 1)]


def test_it_ends_with_a_judgement_when_the_time_is_spent():
    script = Script((INCONCLUSIVE,) * 3, (INCONCLUSIVE, PASS, PASS), time_for=2)
    assert list(until_decided("xyz", (2, 3, 5), script.measure, script.judge)) == [2, 3]


def test_a_decided_member_stays_decided_whatever_is_said_of_it_later():
    script = Script((PASS, INCONCLUSIVE, PASS), (INCONCLUSIVE, INCONCLUSIVE, PASS), (PASS, PASS, PASS))
    list(until_decided("xyz", (1, 2, 3), script.measure, script.judge))
    assert [names for names, *_ in script.measured] == ["xyz", "y", "y"]


# Simulated comparisons use the same rule and the same statistical tests as `moebench ab`

FAMILY = 200


class Machine:
    """Simulate the times of a family on two sides, with random noise per process, rare disturbances and a slow drift.

    `slowdown` has the candidate's factor for each member. `noise` is the spread of the rounds.
    """

    def __init__(self, generator, slowdown, noise):
        self._generator, self._slowdown, self._noise = generator, slowdown, noise
        self._drift = 0.0
        self.baseline = {key: [] for key in range(len(slowdown))}
        self.candidate = {key: [] for key in range(len(slowdown))}
        self.verdicts = {}

    def measure(self, undecided, rounds):
        for _ in rounds:
            self._drift += self._generator.normal(0, self._noise / 3)
            luck = self._generator.standard_t(4, (4, len(undecided))) * self._noise + self._drift
            disturbed = self._generator.random((4, len(undecided))) < 0.05
            times = np.exp(luck + disturbed * self._generator.exponential(0.05, disturbed.shape))
            for key, one, two, three, four in zip(undecided, *times, strict=True):
                self.baseline[key] += [one, two]
                self.candidate[key] += [three * self._slowdown[key], four * self._slowdown[key]]
        return True

    def judge(self):
        sides = {key: self._sides(key) for key in self.baseline}
        found = judge_times(sides, THRESHOLD, LOOK_FALSE_ALARMS, LOOK_WRONG_PASSES)
        self.verdicts = {key: some.verdict for key, some in found.items()}
        return self.verdicts

    def _sides(self, key):
        blocks = tuple(run // 2 for run in range(len(self.baseline[key])))
        return Sides(tuple(self.baseline[key]), tuple(self.candidate[key]), (blocks, blocks))

    def compare(self):
        for _ in until_decided(range(len(self._slowdown)), schedule(len(self._slowdown)), self.measure, self.judge):
            pass
        return self.verdicts


def test_the_shares_of_the_looks_add_up():
    assert math.isclose(LOOK_FALSE_ALARMS * NUM_LOOKS, FALSE_ALARMS)
    assert math.isclose(LOOK_WRONG_PASSES * NUM_LOOKS, WRONG_PASSES)


@pytest.mark.certify
@pytest.mark.parametrize("noise", [0.003, 0.02])
def test_nothing_changed_and_no_alarm_is_raised(noise, certify):
    """At most 1% of the comparisons, with 200 jobs each, may call any job regressed or improved."""
    generator = np.random.default_rng(5)
    trials = 500 if certify else 15
    alarmed = 0
    for _ in range(trials):
        verdicts = Machine(generator, np.ones(FAMILY), noise).compare().values()
        alarmed += any(verdict in (REGRESSED, Verdict.IMPROVED) for verdict in verdicts)
    assert alarmed <= 0.01 * trials


@pytest.mark.certify
def test_a_slowdown_by_the_threshold_is_found_and_does_not_pass(certify):
    """20 of the 200 jobs are slower by 3%. The rounds spread by 0.3%, as on an H200."""
    generator = np.random.default_rng(6)
    slowdown = np.where(np.arange(FAMILY) % 10 == 0, 1 + THRESHOLD, 1.0)
    found = []
    for _ in range(100 if certify else 5):
        machine = Machine(generator, slowdown, 0.003)
        found += [verdict for key, verdict in machine.compare().items() if slowdown[key] > 1]
    assert found.count(REGRESSED) >= 0.95 * len(found)
    assert found.count(PASS) <= WRONG_PASSES * len(found)


@pytest.mark.certify
def test_a_slowdown_by_the_threshold_passes_as_seldom_as_promised_where_noise_decides(certify):
    """All jobs are slower by 3%. The rounds spread so much that each look decides only some of the jobs."""
    generator = np.random.default_rng(7)
    found = []
    for _ in range(40 if certify else 4):
        found += Machine(generator, np.full(FAMILY, 1 + THRESHOLD), 0.008).compare().values()
    assert found.count(PASS) <= WRONG_PASSES * len(found)
    assert found.count(REGRESSED) > 0
