"""Statistics of samples: medians, their intervals, and how much samples depend on each other."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr, stdtrit  # importing scipy.stats would cost every worker a second

CONFIDENCE = 0.95
#: The fewest samples that give a two-sided 95% interval of the median. Five are too few: 1 − 2·0.5⁵ < 0.95.
MIN_SAMPLES = 6


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of independent samples, and the ends of its exact 95% interval.

    The interval comes from order statistics (binomial). With fewer than MIN_SAMPLES samples its ends are infinite.
    """
    median = float(np.median(samples))
    if len(samples) < MIN_SAMPLES:
        return median, -float("inf"), float("inf")
    rank, ordered = _rank(len(samples)), np.sort(samples)
    return median, float(ordered[rank - 1]), float(ordered[-rank])


def _rank(count: int) -> int:
    """Return the rank at which the exact interval of `count` samples begins. The smallest sample has rank 1."""
    below = bdtr(np.arange(count), count, 0.5)  # P(fewer than k samples lie below the true median), k = 1 … count
    return int(np.searchsorted(below, (1 - CONFIDENCE) / 2, side="right"))


def center_of_rounds(medians: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of several rounds' medians, and the ends of its 95% interval. Each round is one process.

    All samples of one process share its memory addresses and its clocks, so the process is the unit that repeats. With
    MIN_SAMPLES rounds or more, `median_interval` gives the exact interval. With fewer rounds it is Student's interval
    of the logarithms, which assumes that they are normally distributed, and which is wide for two rounds.
    """
    if len(medians) >= MIN_SAMPLES:
        return median_interval(medians)
    median = float(np.median(medians))
    deviation = float(np.std(np.log(medians), ddof=1))
    factor = math.exp(float(stdtrit(len(medians) - 1, (1 + CONFIDENCE) / 2)) * deviation / math.sqrt(len(medians)))
    return median, median / factor, median * factor


def series_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of samples in the order they were taken, and the ends of its 95% interval.

    The interval for independent samples reaches some number of ranks to each side of the middle. Here that number is
    multiplied by `dependence(samples)`. If this reaches beyond the outermost samples, each end is extrapolated: the
    distance from the median to the outermost sample grows in proportion to the ranks.
    """
    count = len(samples)
    if count < MIN_SAMPLES:
        return median_interval(samples)
    middle, ordered = (count - 1) / 2, np.sort(samples)
    median = float(np.median(ordered))
    ranks = dependence(samples) * (middle - (_rank(count) - 1))
    low, high = np.interp([middle - ranks, middle + ranks], np.arange(count), ordered)
    past = max(0.0, ranks / middle - 1)
    return median, float(low - past * (median - low)), float(high + past * (high - median))


def dependence(samples: Sequence[float]) -> float:
    """Return the factor by which an interval for independent samples is too narrow for these samples; at least 1.

    Samples depend on each other because a machine that is slow stays slow for a while. For a first-order autoregressive
    series the factor is √((1 + r) / (1 − r)). r is the correlation between the side of the median that a sample lies on
    and the side of the next sample.
    """
    sides = np.sign(np.asarray(samples) - np.median(samples))
    if len(sides) < MIN_SAMPLES or not sides.any():
        return 1.0
    r = float(np.mean(sides[1:] * sides[:-1]) / np.mean(sides**2))
    r = min(max(r, 0.0), 1 - 2 / len(sides))
    return math.sqrt((1 + r) / (1 - r))


def relative_half_width(median: float, low: float, high: float) -> float:
    """Return half the width of an interval, divided by its median."""
    return (high - low) / 2 / median


#: The smallest slowdown that a gate must not pass, as a share.
THRESHOLD = 0.03
