"""Evidence is weaker if rounds may depend on one another or if sessions differ, and never stronger."""

import math

import numpy as np
import pytest
from scipy import stats

from moebench.verdicts.dependence import MostCareful, Neighbours, Student, between_sessions, widened
from moebench.verdicts.ranksum import Shifts
from moebench.verdicts.shapes import autocorrelated, log_normal
from moebench.verdicts.times import Sides, judge_times
from moebench.verdicts.verdict import Verdict


def estimates(draw, size, count=2000):
    rows = draw(np.random.default_rng(1), (count, size))
    return np.array([Neighbours.of([row]).correlation for row in rows])


# Neighbouring rounds


def test_the_correlation_by_hand():
    """The ranks 1 2 3 4 have the ratio 3 / 5, and the ranks 1 4 2 3 have the ratio (9 + 4 + 1) / 5."""
    assert Neighbours.of([np.array([1.0, 2.0, 5.0, 9.0])]).correlation == pytest.approx(1 - 0.3)
    assert Neighbours.of([np.array([1.0, 9.0, 2.0, 5.0])]).correlation == pytest.approx(1 - 1.4)
    both = Neighbours.of([np.array([1.0, 2.0, 5.0, 9.0]), np.array([1.0, 9.0, 2.0, 5.0]), np.array([1.0, 2.0])])
    assert (both.correlation, both.num_rounds) == (pytest.approx(0.15), 8)


def test_independent_rounds_have_no_correlation_on_average_and_dependent_ones_have():
    assert np.mean(estimates(log_normal(0.01), 20)) == pytest.approx(0, abs=0.02)
    assert np.std(estimates(log_normal(0.01), 20)) == pytest.approx(1 / math.sqrt(20), rel=0.1)
    assert np.mean(estimates(autocorrelated(0.8, 0.01), 100)) == pytest.approx(0.75, abs=0.05)


def test_one_outlier_hides_no_dependence():
    drift = np.arange(20.0)
    drift[10] = 1e6
    assert Neighbours.of([drift]).correlation > 0.7


def test_the_limit_lies_above_the_true_correlation_but_in_few_cases():
    series = autocorrelated(0.8, 0.01)(np.random.default_rng(2), (4000, 20))
    limits = [Neighbours.of([one, two]).limit for one, two in zip(series[::2], series[1::2], strict=True)]
    assert np.mean(np.array(limits) < 0.8) < 0.03


def test_few_rounds_exclude_no_correlation():
    assert Neighbours.of([np.arange(2.0)]).limit == Neighbours.of([]).limit == 1
    few = Neighbours.of([np.array([1.0, 3.0, 2.0, 4.0, 1.5])])
    assert (few.limit, few.widening) == (1, math.inf)
    assert Neighbours(0.0, 400).limit == pytest.approx(math.sin(0.2))
    assert Neighbours(-0.9, 400).widening == 1, "neighbours that repel each other make nothing narrower"


def test_all_rounds_equal_is_no_dependence():
    assert Neighbours.of([np.ones(8)]).correlation == 0


# Evidence


def test_widened_limits_are_those_of_student():
    random = np.random.default_rng(4)
    one, two = random.normal(0, 1, 20), random.normal(3, 1, 20)
    shifts = Shifts.within((one, two))
    found = widened(shifts, Neighbours(0.0, 40), 40)
    r = math.sin(4 / math.sqrt(40))
    freedom = 38 * (1 - r**2) / (1 + r**2)
    level = shifts.exact_level(0.01)
    error = math.sqrt((1 + r) / (1 - r)) * (shifts.center - shifts.lower_limit(0.01)) / stats.norm.isf(level)
    assert found.lower_limit(0.001) == pytest.approx(shifts.center - error * stats.t.isf(0.001, freedom))
    assert found.p_greater == pytest.approx(stats.t.sf(shifts.center / error, freedom))
    assert found.p_less > 0.99


def test_nothing_known_shows_and_excludes_nothing():
    shifts = Shifts.within((np.arange(20.0), np.arange(100.0, 120.0)))
    for unknown in (widened(shifts, Neighbours(1.0, 40), 40), Student(1.0, 0.001, 0.001, 1.9)):
        assert (unknown.p_greater, unknown.p_less) == (1, 1)
        assert (unknown.lower_limit(0.01), unknown.upper_limit(0.01)) == (-math.inf, math.inf)
        assert unknown.smallest_shift(0.01) == math.inf


def test_sessions_are_compared_as_in_a_t_test_of_their_centres():
    """The t-test gets half of every level, because shifts between sessions need not be normal."""
    random = np.random.default_rng(5)
    one = {number: random.normal(number % 3, 0.1, 5) for number in range(6)}
    two = {number: random.normal(2, 0.1, 5) for number in range(3)}
    found = between_sessions(one, two)
    centers = [[np.median(rounds) for rounds in side.values()] for side in (two, one)]
    expected = stats.ttest_ind(*centers, alternative="greater")
    assert (found.freedom, found.p_greater) == (expected.df, pytest.approx(2 * expected.pvalue))
    assert found.lower_limit(0.05) == pytest.approx(stats.ttest_ind(*centers).confidence_interval(0.95).low)


def test_the_most_careful_of_two():
    bold, shy = Student(1.0, 0.1, 0.1, 9.0), Student(0.9, 0.3, 0.3, 5.0)
    both = MostCareful((bold, shy))
    assert (both.p_greater, both.p_less) == (shy.p_greater, max(bold.p_less, shy.p_less))
    assert (both.lower_limit(0.01), both.upper_limit(0.01)) == (shy.lower_limit(0.01), shy.upper_limit(0.01))
    assert both.smallest_shift(0.01) == shy.smallest_shift(0.01)


def test_sides_with_sessions_are_never_bolder_than_the_exact_test():
    """The promise of the exact test therefore holds for exchangeable rounds."""
    random = np.random.default_rng(6)
    for _ in range(50):
        one, two = (tuple(np.exp(random.normal(0, 0.003, 12)).tolist()) for _ in "ab")
        exact = judge_times({0: Sides(one, two)})[0]
        for sessions in (((0,) * 12, (0,) * 12), ((0,) * 6 + (1,) * 6, (0,) * 12)):
            found = judge_times({0: Sides(one, two, sessions=sessions)})[0]
            assert found.p_slower >= exact.p_slower
            assert found.p_faster >= exact.p_faster
            assert found.low <= exact.low <= exact.high <= found.high
            assert found.smallest_effect >= exact.smallest_effect


def test_times_without_any_noise_are_decided():
    alike = Sides((1.0,) * 20, (1.0,) * 20, sessions=((0,) * 20, (0,) * 20))
    slower = Sides((1.0,) * 20, (1.05,) * 20, sessions=((0,) * 20, (0,) * 20))
    assert judge_times({0: alike})[0].verdict is Verdict.PASS
    assert judge_times({0: slower})[0].verdict is Verdict.REGRESSED
