"""The rank-sum test is exact, and its limits invert it. Ties, outliers and modes raise no extra alarms."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from moebench.verdicts.ranksum import Shifts, blocks_needed, group_size_needed, null_tail


def test_the_tail_of_two_and_two_by_hand():
    """The six orders have these values of U: AABB 4, ABAB 3, ABBA 2, BAAB 2, BABA 1, BBAA 0."""
    assert null_tail([(2, 2)]).tolist() == pytest.approx([1 / 6, 2 / 6, 4 / 6, 5 / 6, 1])


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 5), (3, 4), (5, 2)])
def test_the_tail_counts_every_order(first, second):
    """The test enumerates the places that the second group can take."""
    counts = [0] * (first * second + 1)
    for places in itertools.combinations(range(first + second), second):
        counts[sum(place - number for number, place in enumerate(places))] += 1
    assert null_tail([(first, second)]).tolist() == pytest.approx(np.cumsum(counts) / sum(counts))


@pytest.mark.parametrize(("first", "second"), [(5, 5), (12, 9), (30, 5)])
def test_p_values_are_scipys(first, second):
    random = np.random.default_rng(first)
    one, two = random.normal(size=first), random.normal(0.7, size=second)
    shifts = Shifts.within((one, two))
    for ours, side in ((shifts.p_greater, "greater"), (shifts.p_less, "less")):
        assert ours == pytest.approx(mannwhitneyu(two, one, alternative=side, method="exact").pvalue, rel=1e-12)


def test_groups_apart_have_the_smallest_p_value_there_is():
    shifts = Shifts.within(([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]))
    assert shifts.p_greater == pytest.approx(1 / 252)
    assert shifts.p_less == 1
    assert group_size_needed(1 / 252) == 5
    assert group_size_needed(1 / 252.5) == 6


def test_ties_count_against_both():
    shifts = Shifts.within(([1.0] * 5, [1.0] * 5))
    assert shifts.p_greater == shifts.p_less == 1


@pytest.mark.parametrize("sizes", [[(7, 8)], [(2, 2)] * 6, [(2, 1), (3, 2), (2, 2), (4, 3)]])
def test_limits_are_the_shifts_at_which_the_test_turns(sizes):
    random = np.random.default_rng(1)
    groups = [(random.normal(size=first), random.normal(1.0, size=second)) for first, second in sizes]

    def shifted(by):
        return Shifts.within(*((one, two - by) for one, two in groups))

    for level in (0.001, 0.01, 0.2):
        low, high = shifted(0).lower_limit(level), shifted(0).upper_limit(level)
        assert shifted(low - 1e-9).p_greater <= level < shifted(low + 1e-9).p_greater
        assert shifted(high + 1e-9).p_less <= level < shifted(high - 1e-9).p_less


def test_limits_of_groups_too_small_are_infinite():
    shifts = Shifts.within(([1, 2], [3, 4]))
    assert shifts.lower_limit(1 / 6) == 3 - 2
    assert shifts.lower_limit(0.16) == -math.inf
    assert shifts.upper_limit(0.16) == math.inf


# Blocks


def test_the_tail_of_blocks_counts_every_order_within_each():
    """The test enumerates the orders within three blocks, with group sizes (2, 2), (1, 2) and (1, 1)."""
    sizes = [(2, 2), (1, 2), (1, 1)]
    counts = [0] * (4 + 2 + 1 + 1)
    orders = [list(itertools.combinations(range(first + second), second)) for first, second in sizes]
    for places in itertools.product(*orders):
        counts[sum(place - number for some in places for number, place in enumerate(some))] += 1
    assert null_tail(sizes).tolist() == pytest.approx(np.cumsum(counts) / sum(counts))


def test_what_a_block_has_in_common_does_not_count():
    random = np.random.default_rng(2)
    groups = [(random.normal(size=2), random.normal(size=2)) for _ in range(9)]
    common = random.normal(0, 100, size=9)
    moved = [(one + by, two + by) for (one, two), by in zip(groups, common, strict=True)]
    assert Shifts.within(*moved).p_greater == pytest.approx(Shifts.within(*groups).p_greater)
    np.testing.assert_allclose(Shifts.within(*moved).values, Shifts.within(*groups).values, atol=1e-9)


def test_blocks_apart_have_the_smallest_p_value_there_is():
    apart = ([1.0, 2.0], [3.0, 4.0])
    assert Shifts.within(*[apart] * 5).p_greater == pytest.approx(6.0**-5)
    assert blocks_needed(6.0**-5, 2) == 5
    assert blocks_needed(6.0**-5 / 1.01, 2) == 6


def test_a_block_that_lacks_a_group_says_nothing():
    apart = ([1.0, 2.0], [3.0, 4.0])
    assert Shifts.within(apart, ([1.0, 2.0], [])).p_greater == Shifts.within(apart).p_greater == pytest.approx(1 / 6)


def test_the_noise_may_have_any_shape():
    """The noise has two modes, heavy tails and unequal groups. A t-test of so few values would find a difference."""
    random = np.random.default_rng(3)
    trials, level, alarms = 4000, 0.01, 0
    for _ in range(trials):
        noise = np.where(random.random(25) < 0.5, 1.0, 1.3) * np.exp(0.001 * random.standard_cauchy(25))
        alarms += Shifts.within((noise[:20], noise[20:])).p_greater <= level
    assert alarms / trials <= level + 3 * math.sqrt(level * (1 - level) / trials)
    assert alarms > 0
