"""The interval of the median is exact: order statistics give its ranks and its coverage. Few samples have none."""

import math

import numpy as np
import pytest
from scipy.stats import binom, t

from moebench.results.stats import (
    MIN_SAMPLES,
    center_of_rounds,
    dependence,
    median_interval,
    relative_half_width,
    series_interval,
)


def ranks(count):
    """Return the largest k with P(X < k) <= 2.5% for X ~ Binomial(count, 1/2).

    The interval begins at the k-th smallest sample and ends at the k-th largest.
    """
    return max(k for k in range(1, count) if binom.cdf(k - 1, count, 0.5) <= 0.025)


#: count -> k, from tables of the sign test.
KNOWN = {6: 1, 7: 1, 8: 1, 9: 2, 10: 2, 12: 3, 15: 4, 20: 6, 25: 8, 30: 10, 50: 18, 100: 40}


@pytest.mark.parametrize("count", KNOWN)
def test_interval_ends_at_the_ranks_of_the_sign_test(count):
    assert ranks(count) == KNOWN[count]
    samples = np.random.default_rng(count).permutation(np.arange(1.0, count + 1))
    assert median_interval(samples.tolist()) == ((count + 1) / 2, KNOWN[count], count + 1 - KNOWN[count])


@pytest.mark.parametrize("count", range(1, MIN_SAMPLES))
def test_too_few_samples_have_no_interval(count):
    assert 1 - 2 * 0.5**count < 0.95
    assert median_interval([3.0] * count) == (3.0, -math.inf, math.inf)
    assert relative_half_width(*median_interval([3.0] * count)) == math.inf


def test_the_smallest_count_that_has_one():
    assert 1 - 2 * 0.5**MIN_SAMPLES >= 0.95
    assert median_interval([5.0, 1.0, 3.0, 2.0, 6.0, 4.0]) == (3.5, 1.0, 6.0)


def test_equal_samples_have_an_interval_of_no_width():
    assert median_interval([2.5] * 10) == (2.5, 2.5, 2.5)
    assert relative_half_width(2.5, 2.5, 2.5) == 0


@pytest.mark.parametrize("count", [6, 11, 40])
def test_the_interval_covers_the_median_as_often_as_it_says(count):
    """The samples are skewed, as times are, so a normal approximation would not be enough."""
    generator = np.random.default_rng(7)
    trials = 600
    hits = 0
    for samples in generator.exponential(size=(trials, count)):
        _, low, high = median_interval(samples.tolist())
        hits += low <= math.log(2) <= high
    exact = 1 - 2 * binom.cdf(ranks(count) - 1, count, 0.5)
    assert exact >= 0.95
    assert abs(hits / trials - exact) < 4 * math.sqrt(exact * (1 - exact) / trials)


def test_one_outlier_moves_neither_median_nor_interval():
    samples = [float(value) for value in range(1, 21)]
    assert median_interval(samples) == median_interval([*samples[:-1], 1e9])


def test_half_width_is_relative_to_the_median():
    assert relative_half_width(4.0, 3.9, 4.3) == pytest.approx(0.05)


def test_independent_samples_have_nearly_the_exact_interval():
    rng = np.random.default_rng(1)
    factors = [dependence(rng.normal(size=200)) for _ in range(50)]
    assert min(factors) == 1.0
    assert np.mean(factors) < 1.06


def test_the_interval_of_a_series_that_drifts_holds_its_median_as_often_as_it_says():
    """Intervals for independent samples often miss the median, 10, of these first-order autoregressive samples."""
    rng = np.random.default_rng(2)

    def series() -> list[float]:
        deviations = [0.0]
        for shock in rng.normal(size=300):
            deviations.append(0.7 * deviations[-1] + shock)
        return [10 + deviation for deviation in deviations[1:]]

    drawn = [series() for _ in range(200)]
    naive = np.mean([low <= 10 <= high for _, low, high in map(median_interval, drawn)])
    wider = np.mean([low <= 10 <= high for _, low, high in map(series_interval, drawn)])
    assert naive < 0.8
    assert wider > 0.9


def test_the_interval_of_two_regimes_lies_between_them():
    """The samples lie near 3.7 or 5.2. The interval widens by ranks, so it stays in their range."""
    rng = np.random.default_rng(5)
    series = np.concatenate([rng.normal(5.2, 0.1, 60), rng.normal(3.7, 0.1, 46)])
    median, low, high = series_interval(series.tolist())
    assert dependence(series) > 2
    assert min(series) < low < 4 < 5 < median < high < max(series)


def test_the_interval_of_times_has_no_negative_end():
    """Six times of which the first took longer, as they were measured: the interval reaches past the outermost."""
    series = [0.772149, 0.025281, 0.036594, 0.01082, 0.008061, 0.012771]
    median, low, high = series_interval(series)
    assert 0 < low < min(series) < median < max(series) < high
    assert series_interval([0.0] * 3 + [0.0, 1.0, 1.0])[:2] == (0.0, 0.0)


def test_independent_samples_have_their_exact_interval_as_a_series():
    in_turn = [float(number // 2 + 15 * (number % 2)) for number in range(30)]  # alternately below and above
    assert dependence(in_turn) == 1
    assert series_interval(in_turn) == median_interval(in_turn)


def test_where_samples_do_not_reach_the_interval_goes_past_them():
    """The samples drift steadily, so the next sample would lie outside their range."""
    drift = [1 + number / 1000 for number in range(26)]
    median, low, high = series_interval(drift)
    assert low < min(drift) < median < max(drift) < high


def test_a_series_keeps_its_median_and_a_constant_one_has_no_width():
    assert series_interval([1.0] * 10) == (1.0, 1.0, 1.0)
    assert series_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[0] == 3.5


@pytest.mark.parametrize("count", range(2, MIN_SAMPLES))
def test_few_rounds_have_students_interval_of_the_logarithms(count):
    medians = np.random.default_rng(count).uniform(1.0, 1.1, count)
    below, above = t.interval(0.95, count - 1, 0.0, np.std(np.log(medians), ddof=1) / math.sqrt(count))
    center = float(np.median(medians))
    assert center_of_rounds(medians) == pytest.approx((center, center * math.exp(below), center * math.exp(above)))
