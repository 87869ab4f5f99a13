"""Marks stand where work and time put them, below the measured ceilings."""

import pytest

from moebench.report.plots.figures import roofline
from moebench.report.plots.roofline import least_bytes, with_intensity
from moebench.results.frame import to_frame
from moebench.results.record import Status
from tests.moebench.drawn import bad, case, family, legend, line, ok, only, panels

E, K, D, INTER = 8, 2, 256, 512  # the shape in tests.moebench.drawn.SHAPE


EXPERT = 3 * D * INTER


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({}, E * EXPERT + 2 * 64 * D),
        ({"mode": "train"}, 2 * E * EXPERT + 4 * 64 * D),
        ({"expert_activation": "relu2"}, E * EXPERT * 2 / 3 + 2 * 64 * D),
        ({"ep_size": 4}, E / 4 * EXPERT + 2 * 64 * D),
        ({"masked_share": 0.25, "mode": "train"}, 2 * E * EXPERT + 2 * (48 + 64) * D),
    ],
)
def test_what_has_to_move(fields: dict, numbers: float) -> None:
    rows = to_frame([ok(case(64, **fields)), ok(case(64, dtype="float32", **fields))])
    assert list(least_bytes(rows)) == pytest.approx([2 * numbers, 4 * numbers], rel=1e-5)


def test_an_expert_without_tokens_is_not_read_but_has_a_gradient() -> None:
    rows = to_frame([ok(case(1)), ok(case(1, mode="train"))])
    assert list(least_bytes(rows)) == [2 * (K * EXPERT + 2 * D), 2 * ((K + E) * EXPERT + 4 * D)]


def test_frozen_parameters_have_no_gradients_that_move() -> None:
    rows = to_frame([ok(case(64, mode="train"), backend) for backend in ("torch_mm", "torch_mm_lora")])
    trained, frozen = least_bytes(rows)
    assert trained - frozen == pytest.approx(2 * E * EXPERT)


def test_intensity_is_useful_work_over_bytes() -> None:
    row = ok(case(64, mode="train", masked_share=0.5), time_ms=7.0)
    found = with_intensity(to_frame([row]))
    assert found["intensity"].iloc[0] == pytest.approx(row_flops(64 * 0.5) / least_bytes(found).iloc[0])
    assert found[["roof_tflops", "copy_tflops"]].isna().all(axis=None)


def row_flops(num_tokens: float) -> float:
    return 3 * 6 * num_tokens * K * D * INTER


def test_marks_are_the_rates_and_ceilings_the_rate_over_its_fraction() -> None:
    measured = {"roofline_fraction": 0.25, "copy_gb_per_s": 4000.0}
    rows = [ok(case(count), "te", count / 50, **measured) for count in (128, 1024, 16)]
    figure = only(roofline(to_frame([*rows, ok(case(16, mode="train"), "gmm")])))
    shown = panels(figure)
    assert list(shown) == ["forward", "train"]
    marks = line(shown["forward"], "te")
    assert list(marks.get_ydata()) == pytest.approx(sorted(row.tflops for row in rows))
    assert marks.get_linestyle() == "None"
    ceilings = line(shown["forward"], "measured ceiling of the case")
    assert list(ceilings.get_xdata()) == list(marks.get_xdata())
    assert list(ceilings.get_ydata()) == pytest.approx([4 * rate for rate in marks.get_ydata()])
    bottom, top = shown["forward"].get_ylim()
    assert bottom < min(marks.get_ydata())
    assert top > max(ceilings.get_ydata())
    assert "measured ceiling of the case" in legend(figure)


def test_memory_bounds_by_bytes() -> None:
    row = ok(case(64), time_ms=1e-3, roofline_fraction=0.1, copy_gb_per_s=2000.0, l2="cold")
    figure = only(roofline(to_frame([row])))
    memory = line(figure.axes[0], "limit by memory copy speed")
    seconds = least_bytes(to_frame([row])).iloc[0] / 2000e9
    assert list(memory.get_ydata()) == pytest.approx([case(64).flops() / seconds / 1e12])
    warm = only(roofline(to_frame([row.model_copy(update={"l2": "warm"})])))
    assert "limit by memory copy speed" not in [drawn.get_label() for drawn in warm.axes[0].lines]


def test_without_ceilings_the_figure_says_so() -> None:
    figure = only(roofline(to_frame(family("loop"))))
    assert "no ceilings measured" in legend(figure)
    assert not {"measured ceiling of the case", "limit by memory copy speed"} & set(legend(figure))


def test_what_has_no_speed_has_no_mark() -> None:
    rows = [*family("te"), bad(case(512), Status.mismatch, backend="gmm", parity_worst=3.0)]
    (ax,) = only(roofline(to_frame(rows))).axes
    assert [drawn.get_label() for drawn in ax.lines] == ["te"]
    assert roofline(to_frame(rows[-1:])) == []


def test_each_ep_size_and_machine_has_its_own() -> None:
    rows = [ok(case(64)), ok(case(64, ep_size=2)), ok(case(128), gpu="NVIDIA B200")]
    names = [name for name, _ in roofline(to_frame(rows))]
    assert sorted(names) == ["roofline-overview", "roofline-overview-2", "roofline-overview-ep-2"]
