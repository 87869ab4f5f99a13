"""Compute medians of samples, 95% confidence intervals of the medians, and how much samples depend on each other.

In this module an interval is always a 95% confidence interval. scipy is imported on first use, because most commands
only open results. Its module `stats` would take a second to import, so its module `special` is used.
"""

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
#: The fewest samples that give a two-sided 95% interval of the median. Five are too few: 1 − 2·0.5⁵ < 0.95.
MIN_SAMPLES = 6
#: Student's quantile at (1 + CONFIDENCE) / 2, as `scipy.special.stdtrit` returns it, by the number of rounds.
#: The import of scipy would take longer than all else that `show` does with rounds.
_STUDENT = {2: 12.706204736174694, 3: 4.302652729749462, 4: 3.1824463052837078, 5: 2.7764451051977934}


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of independent samples, and the ends of its exact 95% interval.

    The ends are two of the ordered samples, and the binomial distribution gives their ranks. With fewer than
    `MIN_SAMPLES` samples the ends are infinite.
    """
    median = float(np.median(samples))
    if len(samples) < MIN_SAMPLES:
        return median, -float("inf"), float("inf")
    rank, ordered = _rank(len(samples)), np.sort(samples)
    return median, float(ordered[rank - 1]), float(ordered[-rank])


def _rank(count: int) -> int:
    """Return the rank at which the exact interval of `count` samples begins. The smallest sample has rank 1."""
    from scipy.special import bdtr

    below = bdtr(np.arange(count), count, 0.5)  # P(fewer than k samples lie below the true median), k = 1 … count
    return int(np.searchsorted(below, (1 - CONFIDENCE) / 2, side="right"))


def center_of_rounds(medians: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of several rounds' medians, and the ends of its 95% interval. Each round is one process.

    All samples of one process share the process's memory addresses and clocks, so samples of one process do not show
    how processes differ. This function therefore uses one number per process. With `MIN_SAMPLES` rounds or more, it
    returns the exact interval (`median_interval`). With fewer rounds it returns Student's interval of the logarithms.
    Student's interval assumes that the logarithms are normally distributed, and it is wide for two rounds.
    """
    median, low, high = centers_of_rounds(np.asarray([medians], dtype=float))
    return float(median[0]), float(low[0]), float(high[0])


def centers_of_rounds(medians: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what `center_of_rounds` returns, for each row of `medians`. A row has one number per round."""
    num_rounds = medians.shape[1]
    center = np.median(medians, axis=1)
    if num_rounds >= MIN_SAMPLES:
        rank, ordered = _rank(num_rounds), np.sort(medians, axis=1)
        return center, ordered[:, rank - 1], ordered[:, -rank]
    deviations, student = np.std(np.log(medians), axis=1, ddof=1), _STUDENT[num_rounds]
    factors = np.array([math.exp(student * some / math.sqrt(num_rounds)) for some in deviations.tolist()])
    return center, center / factors, center * factors


def series_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of a time series, and the ends of its 95% interval. `samples` are in the order of measurement.

    Among the ordered samples, the interval for independent samples reaches some number of ranks to each side of the
    middle. This function multiplies that number by `dependence(samples)`. If the product reaches beyond the smallest
    and the largest sample, each end is extrapolated: its ratio to the median is the ratio of the outermost sample, to
    the power of how many times further the product reaches. So an interval of times has no negative end.
    """
    count = len(samples)
    if count < MIN_SAMPLES:
        return median_interval(samples)
    middle, ordered = (count - 1) / 2, np.sort(samples)
    median = float(np.median(ordered))
    ranks = dependence(samples) * (middle - (_rank(count) - 1))
    low, high = np.interp([middle - ranks, middle + ranks], np.arange(count), ordered)
    past = ranks / middle - 1
    if past > 0 and median > 0:
        low, high = low * (low / median) ** past, high * (high / median) ** past
    return median, float(low), float(high)


def dependence(samples: Sequence[float]) -> float:
    """Return the factor by which an interval for independent samples is too narrow for these samples; at least 1.

    Samples depend on each other because a machine that is slow stays slow for a while. For a first-order autoregressive
    series with the correlation r between neighbours, the factor is √((1 + r) / (1 − r)). This function computes r from
    signs: each sample counts as +1 above the median and as −1 below it.
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


#: The default threshold of a gate, as a share: the smallest slowdown that must not pass.
THRESHOLD = 0.03
