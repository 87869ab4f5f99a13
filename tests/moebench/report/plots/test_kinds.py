"""The axis holds every value, in few round numbers; what is off it stands at its edge."""

import math

import pytest

from moebench.report.plots.figures import memory, parity, throughput
from moebench.results.frame import to_frame
from moebench.results.record import Status
from tests.moebench.drawn import bad, case, family, line, ok, only


@pytest.mark.parametrize(("worst", "says"), [(math.inf, "∞"), (1e9, "1e+09")])
def test_an_error_off_the_axis_stands_above_all_others(worst: float, says: str) -> None:
    wrong = {512: worst, 768: 37.0}
    rows = [bad(case(count), Status.mismatch, parity_worst=error) for count, error in wrong.items()]
    (ax,) = only(parity(to_frame(family("torch_mm") + rows))).axes
    crosses = dict(zip(*line(ax, "mismatch").get_data(), strict=True))
    assert crosses[768] == 37.0
    assert 1.5 * 37 < crosses[512] < ax.get_ylim()[1] < 1e6
    assert [text.get_text() for text in ax.texts] == [says]


def test_an_error_of_zero_stands_below_all_others() -> None:
    (ax,) = only(parity(to_frame([*family("loop"), ok(case(512), parity_worst=0.0)]))).axes
    assert [text.get_text() for text in ax.texts] == ["0"]
    assert ax.get_ylim()[0] < ax.texts[0].xy[1] < 0.25


def test_ticks_are_few_and_in_the_words_of_the_axis() -> None:
    counts = [2**power for power in range(7, 15)]
    rows = [ok(case(count), time_ms=3.0) for count in counts]
    (ax,) = only(throughput(to_frame(rows))).axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["128", "256", "512", "1K", "2K", "4K", "8K", "16K"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["30K", "100K", "300K", "1M", "3M"]
    (ax,) = only(memory(to_frame(rows))).axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["256 KiB", "1 MiB", "4 MiB", "16 MiB"]
