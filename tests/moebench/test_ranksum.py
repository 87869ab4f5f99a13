"""The rank-sum test is exact, its limits invert it, and ties, outliers and modes never make an alarm."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from moebench.ranksum import (
    group_size_needed,
    lower_limit,
    null_tail,
    p_greater,
    p_less,
    pairwise_shifts,
    upper_limit,
)


def test_the_tail_of_two_and_two_by_hand():
    """Six orders: AABB 4, ABAB 3, ABBA 2, BAAB 2, BABA 1, BBAA 0."""
    assert null_tail(2, 2).tolist() == pytest.approx([1 / 6, 2 / 6, 4 / 6, 5 / 6, 1])


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 5), (3, 4), (5, 2)])
def test_the_tail_counts_every_order(first, second):
    """Against the enumeration of which places the second group takes."""
    counts = [0] * (first * second + 1)
    for places in itertools.combinations(range(first + second), second):
        counts[sum(place - number for number, place in enumerate(places))] += 1
    assert null_tail(first, second).tolist() == pytest.approx(np.cumsum(counts) / sum(counts))


@pytest.mark.parametrize(("first", "second"), [(5, 5), (12, 9), (30, 5)])
def test_p_values_are_scipys(first, second):
    random = np.random.default_rng(first)
    one, two = random.normal(size=first), random.normal(0.7, size=second)
    shifts = pairwise_shifts(one, two)
    for ours, side in ((p_greater, "greater"), (p_less, "less")):
        theirs = mannwhitneyu(two, one, alternative=side, method="exact").pvalue
        assert ours(shifts, first) == pytest.approx(theirs, rel=1e-12)


def test_groups_apart_have_the_smallest_p_value_there_is():
    shifts = pairwise_shifts([1, 2, 3, 4, 5], [6, 7, 8, 9, 10])
    assert p_greater(shifts, 5) == pytest.approx(1 / 252)
    assert p_less(shifts, 5) == 1
    assert group_size_needed(1 / 252) == 5
    assert group_size_needed(1 / 252.5) == 6


def test_ties_count_against_both():
    shifts = pairwise_shifts([1.0] * 5, [1.0] * 5)
    assert p_greater(shifts, 5) == p_less(shifts, 5) == 1


def test_limits_are_the_shifts_at_which_the_test_turns():
    random = np.random.default_rng(1)
    one, two = random.normal(size=7), random.normal(1.0, size=8)
    shifts = pairwise_shifts(one, two)
    for level in (0.001, 0.01, 0.2):
        low, high = lower_limit(shifts, 7, level), upper_limit(shifts, 7, level)
        assert p_greater(pairwise_shifts(one, two - (low - 1e-9)), 7) <= level < p_greater(shifts - (low + 1e-9), 7)
        assert p_less(pairwise_shifts(one, two - (high + 1e-9)), 7) <= level < p_less(shifts - (high - 1e-9), 7)


def test_limits_of_groups_too_small_are_infinite():
    shifts = pairwise_shifts([1, 2], [3, 4])
    assert lower_limit(shifts, 2, 1 / 6) == 3 - 2
    assert lower_limit(shifts, 2, 0.16) == -math.inf
    assert upper_limit(shifts, 2, 0.16) == math.inf


def test_the_noise_may_have_any_shape():
    """Two modes, heavy tails and unequal groups: what a t-test of so few would call a difference."""
    random = np.random.default_rng(3)
    trials, level, alarms = 4000, 0.01, 0
    for _ in range(trials):
        noise = np.where(random.random(25) < 0.5, 1.0, 1.3) * np.exp(0.001 * random.standard_cauchy(25))
        alarms += p_greater(pairwise_shifts(noise[:20], noise[20:]), 20) <= level
    assert alarms / trials <= level + 3 * math.sqrt(level * (1 - level) / trials)
    assert alarms > 0
