"""Figures show what was measured: values, gaps, mismatches, and a place for every row."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest

from moebench.report.plots.figures import draw as draw_all
from moebench.report.plots.figures import memory, parity, throughput, write_plots
from moebench.report.plots.lines import spaced
from moebench.results.frame import to_frame
from moebench.results.record import Status
from tests.moebench.drawn import (
    COUNTS,
    LONG,
    bad,
    case,
    family,
    figures_of,
    labels,
    legend,
    line,
    ok,
    only,
    panels,
    texts,
)


def test_throughput_draws_the_rates_of_the_frame_with_their_interval() -> None:
    frame = to_frame(family("loop") + family("torch_mm", mode="train"))
    shown = panels(only(throughput(frame)))
    assert list(shown) == ["forward", "train"]
    drawn = line(shown["train"], "torch_mm tokens/s")
    np.testing.assert_array_equal(drawn.get_xdata(), COUNTS)
    np.testing.assert_allclose(drawn.get_ydata(), frame["tokens_per_s"].iloc[3:])
    band = shown["train"].collections[0].get_paths()[0].vertices
    rates = frame["tokens_per_s"].iloc[3:]
    assert band[:, 1].min() == pytest.approx(rates.min() / 1.2)
    assert band[:, 1].max() == pytest.approx(rates.max() / 0.9)


def test_what_bounds_a_rate_is_drawn_beside_it() -> None:
    """The bounds are the grouped GEMMs and the roofline of most backends. An FP8 backend has its own roofline."""
    bounds = {"loop": 0.5, "torch_mm": 0.5, "te_fp8_block": 0.25}
    rows = [
        ok(case(count), backend, time_ms=count / 100, grouped_ms=1.0, roofline_ms=bound)
        for backend, bound in bounds.items()
        for count in COUNTS
    ]
    figure = only(throughput(to_frame(rows)))
    (ax,) = figure.axes
    active = np.array([case(count).num_active_tokens for count in COUNTS])
    np.testing.assert_allclose(line(ax, "grouped GEMMs only").get_ydata(), active / 1.0 * 1e3)
    np.testing.assert_allclose(line(ax, "roofline").get_ydata(), active / 0.5 * 1e3)
    assert ax.get_ylim()[1] > active[-1] / 0.5 * 1e3
    assert {"grouped GEMMs only", "roofline"} <= set(legend(figure))
    assert not {"grouped GEMMs only", "roofline"} & set(legend(only(throughput(to_frame(family("loop"))))))


def test_tflops_are_read_off_the_right_axis_exactly() -> None:
    frame = to_frame(family("loop", masked_share=0.25))
    figure = only(throughput(frame))
    (right,) = figure.axes[0].child_axes
    figure.draw_without_rendering()
    at = frame.iloc[1]
    left_height = figure.axes[0].transData.transform((256, at["tokens_per_s"]))[1]
    assert right.transData.transform((0, at["tflops"]))[1] == pytest.approx(left_height)
    assert right.get_ylabel() == "TFLOP/s"


def test_memory_draws_peak_and_saved_bytes() -> None:
    frame = to_frame(family("loop", mode="train"))
    (ax,) = only(memory(frame)).axes
    np.testing.assert_array_equal(line(ax, "loop peak").get_ydata(), frame["peak_memory_bytes"])
    saved = line(ax, "loop saved for backward")
    np.testing.assert_array_equal(saved.get_ydata(), frame["saved_memory_bytes"])
    assert saved.is_dashed()
    assert not line(ax, "loop peak").is_dashed()


@pytest.mark.parametrize("status", [Status.mismatch, Status.oom, Status.crash])
@pytest.mark.parametrize("draw", [throughput, memory])
def test_what_failed_is_a_gap_and_is_named(status: Status, draw: Any) -> None:
    failed = bad(case(512), status, parity_worst=5.0)
    figure = only(draw(to_frame([*family("torch_mm"), failed])))
    (ax,) = figure.axes
    drawn = line(ax, "torch_mm tokens/s" if draw is throughput else "torch_mm peak")
    at_failure = drawn.get_ydata()[list(drawn.get_xdata()).index(512)]
    assert math.isnan(at_failure)
    assert "mismatch" not in labels(ax)
    assert f"Not drawn: torch_mm {status} ×1" in texts(figure)


def test_a_mismatch_beside_a_good_seed_is_not_drawn_as_speed() -> None:
    wrong = bad(case(256, seed=1), Status.mismatch, parity_worst=5.0)
    rows = [*family("torch_mm"), wrong]
    (ax,) = only(throughput(to_frame(rows))).axes
    assert line(ax, "torch_mm tokens/s").get_ydata()[1] == pytest.approx(rows[1].tokens_per_s)
    assert "mismatch" not in labels(ax)


def test_a_row_that_did_not_converge_is_hollow() -> None:
    figure = only(throughput(to_frame([*family("loop"), ok(case(512), time_ms=4.0, converged=False)])))
    hollow = line(figure.axes[0], "not converged")
    assert list(zip(*hollow.get_data(), strict=True)) == [(512, pytest.approx(512 / 4e-3))]
    assert "not converged" in legend(figure)


def test_families_apart_routings_in_panels() -> None:
    rows = family("loop") + family("loop", routing="zipf:1.2") + family("loop", dtype="float32", expert_bias=True)
    shown = figures_of(throughput(to_frame(rows)))
    assert sorted(shown) == [
        "throughput-e8k2d256i512-bfloat16-swiglu",
        "throughput-e8k2d256i512-float32-swiglu-bias",
    ]
    assert list(panels(shown["throughput-e8k2d256i512-bfloat16-swiglu"])) == ["forward, uniform", "forward, zipf:1.2"]


def test_ep_sizes_have_figures_of_their_own() -> None:
    rows = family("loop") + family("loop", ep_size=2) + family("loop", ep_size=8)
    rows += [ok(case(64, ep_size=size, dtype="float32")) for size in (1, 2)]
    assert sorted(slug for slug, _ in throughput(to_frame(rows))) == [
        "throughput-e8k2d256i512-bfloat16-swiglu",
        "throughput-e8k2d256i512-bfloat16-swiglu-ep-2",
        "throughput-e8k2d256i512-bfloat16-swiglu-ep-8",
        "throughput-overview",
        "throughput-overview-ep-2",
    ]


def test_loads_of_the_ranks_have_panels_of_their_own() -> None:
    rows = [row for load in ("uneven", "even", "one-empty") for row in family("loop", ep_size=2, rank_load=load)]
    shown = panels(only(throughput(to_frame(rows))))
    assert list(shown) == ["forward", "forward, one empty rank", "forward, uneven ranks"]
    drawn = {title: line(ax, "loop tokens/s").get_ydata() for title, ax in shown.items()}
    rates = {load: [row.tokens_per_s for row in rows if row.rank_load == load] for load in ("even", "uneven")}
    np.testing.assert_allclose(drawn["forward"], rates["even"])
    np.testing.assert_allclose(drawn["forward, uneven ranks"], rates["uneven"])
    (right,) = shown["forward, uneven ranks"].child_axes
    assert right.get_ylabel() == "TFLOP/s"


def test_a_backend_with_one_count_is_compared_in_the_overview() -> None:
    rows = [*family("torch_mm"), ok(case(256), "gmm", 1.0), ok(case(256, routing="zipf"), "torch_mm", 2.0)]
    shown = figures_of(throughput(to_frame(rows)))
    assert list(shown) == ["throughput-e8k2d256i512-bfloat16-swiglu", "throughput-overview"]
    (ax,) = shown["throughput-e8k2d256i512-bfloat16-swiglu"].axes
    assert [label for label in labels(ax) if "tokens/s" in label] == ["torch_mm tokens/s"]
    (ax,) = shown["throughput-overview"].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["uniform", "zipf"]
    assert line(ax, "gmm tokens/s").get_xdata() == pytest.approx([256 / 1e-3])
    assert line(ax, "torch_mm tokens/s").get_xdata() == pytest.approx([256 / 3.56e-3, 256 / 2e-3])


def test_two_machines_are_never_on_one_line() -> None:
    other = [ok(case(count), gpu="NVIDIA B200") for count in COUNTS]
    shown = throughput(to_frame(family("loop")[:0] + other)) + throughput(to_frame(family("loop")))
    both = throughput(pd.concat([to_frame(family("loop")), to_frame(other)]))
    assert len(both) == len(shown) == 2
    assert len({slug for slug, _ in both}) == 2


def test_two_machines_are_two_rows_of_an_overview() -> None:
    here, there = ok(case(64)), ok(case(64), gpu="NVIDIA B200", time_ms=1.0)
    (ax,) = only(throughput(pd.concat([to_frame([here]), to_frame([there])]))).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["NVIDIA H200", "NVIDIA B200"]
    assert sorted(line(ax, "loop tokens/s").get_xdata()) == [64 / 2e-3, 64 / 1e-3]


def test_what_is_on_no_line_is_in_the_overview() -> None:
    lone = [ok(case(64, dtype="float32"), "loop", time_ms=4.0), ok(case(0), "loop", tflops=None)]
    shown = figures_of(throughput(to_frame(family("loop") + lone)))
    assert list(shown) == ["throughput-e8k2d256i512-bfloat16-swiglu", "throughput-overview"]
    (ax,) = shown["throughput-overview"].axes
    (drawn,) = (one for one in ax.lines if one.get_label() == "loop tokens/s")
    assert [rate for rate in drawn.get_xdata() if not math.isnan(rate)] == [64 / 4e-3]
    memory_figure = figures_of(memory(to_frame(family("loop") + lone)))["memory-overview"]
    (peak,) = (one for one in memory_figure.axes[0].lines if one.get_label() == "loop peak")
    assert len(peak.get_xdata()) == 2, "a case without tokens has a memory"


def test_backends_of_one_case_stand_at_places_of_their_own_and_cases_do_not_mix() -> None:
    pairs = [(engine, way) for engine in ("loop", "gmm", "te") for way in ("allgather", "alltoall", "deepep")]
    few, many = case(64, ep_size=2, dim=64), case(64, ep_size=2, dim=128)
    rows = [ok(few, "te", 1.0, "deepep"), *(ok(many, engine, 1.0, way) for engine, way in pairs)]
    (ax,) = only(throughput(to_frame(rows))).axes
    drawn = [one for one in ax.lines if str(one.get_label()).endswith("tokens/s")]
    places = sorted(float(y) for one in drawn for y in one.get_ydata())
    assert len(places) == len(set(places)) == 10
    (edge,) = (float(y) for segment in ax.collections[-1].get_segments() for y in segment[:1, 1])
    assert places[0] < edge < places[1], "one above the line between the cases, nine below"
    assert [round(a, 3) for a in np.diff(places[1:])] == [0.16] * 8


@pytest.mark.parametrize("draw", [throughput, memory])
def test_every_value_of_an_overview_stands_at_its_case(draw: Any) -> None:
    rows = [ok(case(8 * (at + 1), seed=at, dim=64 + 8 * at), time_ms=at + 1.0) for at in range(30)]
    frame = to_frame(rows)
    column = {throughput: "tokens_per_s", memory: "peak_memory_bytes"}[draw]
    shown = figures_of(draw(frame))
    assert len(shown) == 2, "30 cases need two pages"
    seen = {}
    for figure in shown.values():
        (ax,) = figure.axes
        labels = {place: text.get_text() for place, text in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
        drawn = next(one for one in ax.lines if one.get_label().startswith("loop "))
        seen.update({labels[y].split()[0]: x for x, y in zip(*drawn.get_data(), strict=True)})
    expected = {f"e8k2d{row['dim']}i512": float(row[column]) for row in frame.to_dict("records")}
    assert seen == pytest.approx(expected)


def test_several_seeds_meet_in_their_median_and_worst() -> None:
    rows = [
        ok(case(n, seed=s), time_ms=t, peak_memory_bytes=t * 10) for n in (128, 256) for s, t in enumerate((1, 2, 4))
    ]
    (ax,) = only(throughput(to_frame(rows))).axes
    np.testing.assert_allclose(line(ax, "loop tokens/s").get_ydata(), [128 / 2e-3, 256 / 2e-3])
    (ax,) = only(memory(to_frame(rows))).axes
    np.testing.assert_allclose(line(ax, "loop peak").get_ydata(), [40, 40])


@pytest.mark.parametrize("draw", [throughput, memory, parity])
def test_nothing_measured_makes_no_figure(draw: Any) -> None:
    assert draw(to_frame([])) == []
    assert draw(to_frame([bad(case(count), Status.unsupported) for count in COUNTS])) == []


def test_written_svg_is_the_same_every_time(tmp_path: Path) -> None:
    lines = [row for mode in ("forward", "train") for name in ("loop", LONG) for row in family(name, mode=mode)]
    frame = to_frame([*lines, ok(case(64, dtype="float32"))])
    first = write_plots(draw_all(frame, ("svg",)), tmp_path / "a" / "plots")
    second = write_plots(draw_all(frame, ("svg",)), tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in second]
    assert len(first) == 7, "a figure and an overview of each of throughput and memory, a ratio, parity and a roofline"
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_png_and_svg_are_written_and_settings_left_alone(tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 7.0, "axes.grid": False}):
        paths = write_plots(draw_all(to_frame(family("loop"))[:2]), tmp_path)
        assert (matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.grid"]) == (7.0, False)
    assert {path.suffix for path in paths} == {".png", ".svg"}
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG")


def test_plots_of_families_that_are_gone_are_removed_and_nothing_else(tmp_path: Path) -> None:
    old = write_plots(draw_all(to_frame(family("loop") + family("loop", dtype="float32"))), tmp_path)
    others = ["throughput.png", "notes.png", "my-parity-a.svg", "parity-a.pdf", "memory-table.csv"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "memory-folder.png").mkdir()
    new = write_plots(draw_all(to_frame(family("loop", dtype="float32")), ("svg",)), tmp_path)
    kept = {path for path in old if "float32" in path.name or path.stem in ("roofline-overview", "parity-overview")}
    assert set(new) < kept, "a plot of a family that is still there stays, in whatever format"
    assert set(tmp_path.iterdir()) == kept | {tmp_path / name for name in (*others, "memory-folder.png")}
    assert write_plots(draw_all(to_frame([])), tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {*others, "memory-folder.png"}


def test_token_counts_are_labelled_where_their_labels_stand_apart() -> None:
    assert spaced([16, 128, 512, 2048, 8192, 16384]) == [16, 128, 512, 2048, 8192, 16384]
    assert spaced([1, 4, 16, 64, 128, 256, 16384]) == [1, 4, 16, 64, 256, 16384]
    assert spaced([1, 1000, 1001]) == [1, 1001], "the last has its label, rather than the one before"
    assert spaced([8]) == [8]
    assert spaced([]) == []
