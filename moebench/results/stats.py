"""Statistics of samples. No torch here."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr, stdtrit  # scipy.stats takes a second to import, in every worker

CONFIDENCE = 0.95
#: Fewer samples than this have no two-sided 95% interval of the median: 1 − 2·0.5⁵ < 0.95.
MIN_SAMPLES = 6


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median of independent samples and its exact 95% interval, from order statistics (binomial).

    With fewer than MIN_SAMPLES samples there is no such interval: its ends are infinite.
    """
    median = float(np.median(samples))
    if len(samples) < MIN_SAMPLES:
        return median, -float("inf"), float("inf")
    rank, ordered = _rank(len(samples)), np.sort(samples)
    return median, float(ordered[rank - 1]), float(ordered[-rank])


def _rank(count: int) -> int:
    """Of the sample, counted from the least, at which the exact interval of so many begins."""
    below = bdtr(np.arange(count), count, 0.5)  # P(fewer than k of them lie below the true median), k = 1 … count
    return int(np.searchsorted(below, (1 - CONFIDENCE) / 2, side="right"))


def center_of_rounds(medians: Sequence[float]) -> tuple[float, float, float]:
    """Median of the medians of several rounds, one process each, and its 95% interval.

    Samples of one process share its luck (addresses, clocks): the process is what repeats. From MIN_SAMPLES rounds on
    the interval is the exact one of `median_interval`; of fewer it is Student's on their logarithms, which takes
    them to be normal, and is wide for two.
    """
    if len(medians) >= MIN_SAMPLES:
        return median_interval(medians)
    median = float(np.median(medians))
    deviation = float(np.std(np.log(medians), ddof=1))
    factor = math.exp(float(stdtrit(len(medians) - 1, (1 + CONFIDENCE) / 2)) * deviation / math.sqrt(len(medians)))
    return median, median / factor, median * factor


def series_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median of samples in the order they were taken, and its 95% interval, so many more ranks wide as they depend on
    one another (`dependence`). Where there are not so many, it ends as far past the samples as those are apart.
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
    """How many times too narrow an interval is that takes these samples for independent: at least 1.

    √((1 + r) / (1 − r)) for a first-order autoregressive series, r the correlation of a sample's side of the median
    with the next one's: a machine that is slow is slow for a while.
    """
    sides = np.sign(np.asarray(samples) - np.median(samples))
    if len(sides) < MIN_SAMPLES or not sides.any():
        return 1.0
    r = float(np.mean(sides[1:] * sides[:-1]) / np.mean(sides**2))
    r = min(max(r, 0.0), 1 - 2 / len(sides))
    return math.sqrt((1 + r) / (1 - r))


def relative_half_width(median: float, low: float, high: float) -> float:
    """Half the width of an interval, relative to its median."""
    return (high - low) / 2 / median


THRESHOLD = 0.03
