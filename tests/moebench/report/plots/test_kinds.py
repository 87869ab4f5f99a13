"""The axis has few ticks, at round numbers, and shows every value. A value off the axis stands at its edge."""

import math

import pytest

from moebench.report.plots.figures import memory, parity, roofline, throughput
from moebench.report.plots.kinds import MOST_TICKS, MOST_TICKS_ALONG_X, round_ticks
from moebench.results.frame import to_frame
from moebench.results.record import Status
from tests.moebench.drawn import bad, case, family, figures_of, line, ok, only


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
    assert [text.get_text() for text in ax.get_yticklabels()] == ["30k", "100k", "300k", "1M", "3M"]
    (ax,) = only(memory(to_frame(rows))).axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["256 KiB", "1 MiB", "4 MiB", "16 MiB"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.2, 9.6, [2, 5]),
        (30.0, 2000.0, [50, 100, 200, 500, 1000, 2000]),
        (2e4, 5e6, [3e4, 1e5, 3e5, 1e6, 3e6]),
        (0.0017, 40.0, [0.01, 0.1, 1, 10]),
        (31.0, 80.0, [40, 50, 60, 70, 80]),
        (51.0, 131.0, [70, 100]),
    ],
)
def test_round_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(("base", "least"), [(10, 2.56), (2, 8.0)])
@pytest.mark.parametrize("most", [MOST_TICKS, MOST_TICKS_ALONG_X])
def test_every_axis_has_two_ticks_and_few_wherever_it_lies(base: int, least: float, most: int) -> None:
    for at in range(-50, 120):
        for span in (0.0, 0.1, 0.3, 0.5, 1.0, 1.7, 2.5, 4.0, 6.0, 9.0, 12.0):
            low = 10 ** (at / 10)
            ticks = round_ticks(low, low * least * 10**span, base, most)
            assert 2 <= len(ticks) <= most, (low, span)
            assert ticks == sorted(set(ticks))
            assert low <= ticks[0] < ticks[-1] <= low * least * 10**span


def test_a_lone_point_still_has_two_labels_on_each_axis() -> None:
    for token_count in (64, 100, 512):
        for figure in figures_of(roofline(to_frame([ok(case(token_count), time_ms=3.0)]))).values():
            for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
                assert len([text for text in axis.get_ticklabels() if text.get_text()]) >= 2
