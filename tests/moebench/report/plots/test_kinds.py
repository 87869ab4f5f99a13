"""The axis has few ticks, at round numbers, and shows every value. A value off the axis stands at its edge."""

import math

import pytest

from moebench.report.plots.figures import decode, memory, parity, ratio, roofline, throughput
from moebench.report.plots.kinds import MOST_TICKS, MOST_TICKS_ALONG_X, round_ticks
from moebench.results.frame import to_frame
from moebench.results.record import Status
from tests.moebench.drawn import bad, case, family, figures_of, labels, line, ok, only


@pytest.mark.parametrize(("worst", "says"), [(math.inf, "∞"), (1e9, "1e+09")])
def test_an_error_off_the_axis_stands_beyond_all_others(worst: float, says: str) -> None:
    wrong = {512: worst, 768: 37.0}
    rows = [bad(case(count), Status.mismatch, parity_worst=error) for count, error in wrong.items()]
    (ax,) = only(parity(to_frame(family("torch_mm") + rows))).axes
    edge, inside = line(ax, "mismatch").get_xdata()
    assert inside == 37.0
    assert 1.5 * 37 < edge < ax.get_xlim()[1] < 1e6
    assert [text.get_text() for text in ax.texts] == [says]


def test_an_error_of_zero_stands_before_all_others() -> None:
    (ax,) = only(parity(to_frame([*family("loop"), ok(case(512), parity_worst=0.0)]))).axes
    assert [text.get_text() for text in ax.texts] == ["0"]
    assert ax.get_xlim()[0] < ax.texts[0].xy[0] < 0.25


def test_a_ratio_is_the_time_over_the_fastest_of_its_case() -> None:
    """At each count, `loop` is the fastest, and `gmm` takes 1.2 times as long. `te` takes 9 times as long."""
    scales = {"loop": 1.0, "gmm": 1.2, "te": 9.0}
    rows = [ok(case(count), name, time_ms=by * count) for count in (128, 512) for name, by in scales.items()]
    (ax,) = only(ratio(to_frame(rows))).axes
    assert list(line(ax, "gmm time / fastest").get_ydata()) == pytest.approx([1.2, 1.2])
    assert list(line(ax, "loop time / fastest").get_ydata()) == pytest.approx([1.0, 1.0])
    bottom, top = ax.get_ylim()
    assert 0.8 < bottom < 0.97, "the interval of the fastest does not reach below"
    assert 3.0 < top < 4.0
    (edge,) = {y for drawn in ax.lines if drawn.get_marker() == "D" for y in drawn.get_ydata() if y == y}
    assert 3.0 < edge < top
    assert [text.get_text() for text in ax.texts] == []
    assert "1.2×" in [text.get_text() for text in ax.get_yticklabels()]


def test_a_case_with_one_time_has_no_ratio() -> None:
    alone = [ok(case(128)), ok(case(512)), bad(case(512), Status.crash, "te")]
    assert ratio(to_frame(alone)) == []
    other_run = ok(case(128), "te").model_copy(update={"run_id": "20270101-later"})
    assert ratio(to_frame([*alone, other_run])) == [], "two runs are not compared"


def test_decoding_draws_the_graph_beside_the_call() -> None:
    rows = [ok(case(count), "triton", 2.0, graph_time_ms=1.0) for count in (1, 64, 512)]
    rows += [ok(case(count), "gmm", 5.0) for count in (1, 64, 512)]
    more = [
        ok(case(count, **how), "triton", 2.0, graph_time_ms=1.0) for count, how in ((1024, {}), (64, {"mode": "train"}))
    ]
    (ax,) = only(decode(to_frame(rows + more))).axes
    drawn = line(ax, "triton CUDA graph")
    assert dict(zip(*drawn.get_data(), strict=True)) == {1: 1.0, 64: 1.0, 512: 1.0}, "forwards of few tokens alone"
    assert list(line(ax, "triton call").get_ydata()) == [2.0, 2.0, 2.0]
    assert list(line(ax, "gmm call").get_ydata()) == [5.0, 5.0, 5.0]
    assert "gmm CUDA graph" not in labels(ax)
    assert decode(to_frame(rows[3:])) == [], "nothing was captured"


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
