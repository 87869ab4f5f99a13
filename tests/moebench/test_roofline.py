"""Marks stand where work and time put them, below the ceilings that were measured."""

import pytest

from moebench.frame import to_frame
from moebench.plots import roofline
from moebench.record import Status
from moebench.roofline import least_bytes, with_intensity
from tests.moebench.drawn import bad, case, family, legend, line, ok, only, panels

E, K, D, INTER = 8, 2, 256, 512  # of tests.moebench.drawn.SHAPE


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 2 * (E * 3 * D * INTER + 2 * 64 * D)),
        ({"mode": "train"}, 2 * (3 * E * 3 * D * INTER + 4 * 64 * D)),
        ({"expert_activation": "relu2", "dtype": "float32"}, 4 * (E * 2 * D * INTER + 2 * 64 * D)),
        ({"ep_size": 4}, 2 * (E / 4 * 3 * D * INTER + 2 * 64 * D)),
    ],
)
def test_what_has_to_move(fields: dict, expected: float) -> None:
    assert least_bytes(to_frame([ok(case(64, **fields))])).iloc[0] == expected


def test_an_expert_that_no_token_can_choose_is_not_read() -> None:
    assert least_bytes(to_frame([ok(case(3))])).iloc[0] == 2 * (3 * K * 3 * D * INTER + 2 * 3 * D)


def test_intensity_is_useful_work_over_bytes() -> None:
    row = ok(case(64, mode="train", masked_share=0.5), time_ms=7.0)
    found = with_intensity(to_frame([row]))
    assert found["intensity"].iloc[0] == pytest.approx(row_flops(64 * 0.5) / least_bytes(found).iloc[0])
    assert found["ceiling_tflops"].isna().all()


def row_flops(num_tokens: float) -> float:
    return 3 * 6 * num_tokens * K * D * INTER


def test_marks_are_the_rates_and_the_ceiling_is_the_rate_over_its_fraction() -> None:
    rows = [ok(case(count), "te", count / 50, roofline_fraction=0.25) for count in (128, 1024, 16)]
    figure = only(roofline(to_frame([*rows, ok(case(16, mode="train"), "gmm")])))
    shown = panels(figure)
    assert list(shown) == ["forward", "train"]
    marks = line(shown["forward"], "te")
    assert sorted(marks.get_ydata()) == pytest.approx(sorted(row.tflops for row in rows))
    assert marks.get_linestyle() == "None"
    ceiling = line(shown["forward"], "measured ceiling")
    assert list(ceiling.get_xdata()) == sorted(marks.get_xdata())
    assert list(ceiling.get_ydata()) == pytest.approx([4 * rows[at].tflops for at in (2, 0, 1)])
    bottom, top = shown["forward"].get_ylim()
    assert bottom < min(marks.get_ydata())
    assert top > max(ceiling.get_ydata())
    assert "measured ceiling" in legend(figure)


def test_without_ceilings_the_figure_says_so() -> None:
    figure = only(roofline(to_frame(family("loop"))))
    assert "no ceiling: this run measured none" in legend(figure)
    assert "measured ceiling" not in legend(figure)


def test_what_has_no_speed_has_no_mark() -> None:
    rows = [*family("te"), bad(case(512), Status.mismatch, backend="gmm", parity_worst=3.0)]
    (ax,) = only(roofline(to_frame(rows))).axes
    assert [drawn.get_label() for drawn in ax.lines] == ["te"]
    assert roofline(to_frame(rows[-1:])) == []


def test_each_ep_size_and_machine_has_its_own() -> None:
    rows = [ok(case(64)), ok(case(64, ep_size=2)), ok(case(128), gpu="NVIDIA B200")]
    names = [name for name, _ in roofline(to_frame(rows))]
    assert sorted(names) == ["roofline-overview", "roofline-overview-2", "roofline-overview-ep-2"]
