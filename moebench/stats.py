"""Statistics of samples. No torch here."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import quantile_test

CONFIDENCE = 0.95
#: Fewer samples than this have no two-sided 95% interval of the median: 1 − 2·0.5⁵ < 0.95.
MIN_SAMPLES = 6


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median of independent samples and its exact 95% interval, from order statistics (binomial; scipy.quantile_test).

    With fewer than MIN_SAMPLES samples there is no such interval: its ends are infinite.
    """
    median = float(np.median(samples))
    if len(samples) < MIN_SAMPLES:
        return median, -float("inf"), float("inf")
    low, high = np.asarray(quantile_test(samples, q=median, p=0.5).confidence_interval(CONFIDENCE))
    return median, float(low), float(high)


def relative_half_width(median: float, low: float, high: float) -> float:
    """Half the width of an interval, relative to its median."""
    return (high - low) / 2 / median
