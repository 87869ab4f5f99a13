"""Tables hold the cells of the frame and never two rows in one cell; panels show what is asked or say why not."""

import subprocess
import sys
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import moebench
from moebench.errors import ResultsError
from moebench.results.frame import to_frame
from moebench.results.record import Status
from tests.moebench.drawn import COUNTS, bad, case, family, ok


def test_a_cell_is_the_row_of_its_case_and_backend() -> None:
    rows = [*family("te"), *family("loop"), ok(case(128, ep_size=1), "gmm", 9.0)]
    table = moebench.pivot(to_frame(rows))
    assert list(table.columns) == ["loop", "gmm", "te"], "the reference first"
    assert list(table.index) == list(COUNTS)
    assert table.loc[128, "gmm"] == 9.0
    assert table["gmm"].isna().tolist() == [False, True, True]
    assert table["te"].tolist() == [row.time_ms for row in family("te")]
    peaks = moebench.pivot(to_frame(rows), "peak_memory_bytes")
    assert peaks.loc[256, "te"] == 256 * 1000


def test_what_varies_is_the_index() -> None:
    rows = family("te") + family("te", mode="train") + family("te", mode="train", routing="zipf")
    table = moebench.pivot(to_frame(rows))
    assert table.index.names == ["routing", "mode", "num_tokens"]
    assert len(table) == 9
    assert moebench.pivot(to_frame(family("te")[:1])).index.names == ["num_tokens"]


def test_a_models_name_stands_for_its_shape() -> None:
    rows = [ok(case(128, model="a", dim=64), "te"), ok(case(128, model="b", dim=256), "te")]
    assert moebench.pivot(to_frame(rows)).index.names == ["model"]
    own = [ok(case(128, dim=64), "te"), ok(case(128, model="b", dim=256), "te")]
    assert moebench.pivot(to_frame(own)).index.names == ["model", "dim"]


def test_dispatchers_have_columns_and_failures_no_value() -> None:
    rows = [ok(case(64, ep_size=2), "te", 1.0, name) for name in ("deepep", "alltoall")]
    wrong = bad(case(64, ep_size=2), Status.mismatch, "gmm", "deepep", parity_worst=3.0)
    frame = to_frame([*rows, wrong])
    assert list(moebench.pivot(frame).columns) == ["gmm+deepep", "te+alltoall", "te+deepep"]
    assert moebench.pivot(frame, "parity_worst")["gmm+deepep"].isna().all()
    assert moebench.pivot(frame, "status")["gmm+deepep"].tolist() == ["mismatch"]


def test_no_cell_holds_two_rows() -> None:
    frame = to_frame(family("te") + family("te", mode="train"))
    with pytest.raises(ResultsError, match="6 rows have the same num_tokens and backend: they differ in mode;"):
        moebench.pivot(frame, index=["num_tokens"])
    twice = pd.concat([frame, frame.assign(run_id="other")])
    with pytest.raises(ResultsError, match="they differ in run_id"):
        moebench.pivot(twice)
    with pytest.raises(ResultsError, match="no column 'speed'"):
        moebench.pivot(frame, "speed")


@pytest.mark.parametrize("kind", ["throughput", "memory", "parity"])
def test_a_panel_has_the_values_a_title_and_units(kind: str) -> None:
    frame = to_frame(family("loop") + family("torch_mm"))
    ax = moebench.plot(frame, kind, ax=Figure(figsize=(7, 4)).add_subplot())
    column = {"throughput": "tokens_per_s", "memory": "peak_memory_bytes", "parity": "parity_worst"}[kind]
    drawn = next(line for line in ax.lines if str(line.get_label()).startswith("torch_mm "))
    np.testing.assert_allclose(np.asarray(drawn.get_ydata(), float), frame[column].iloc[3:].astype(float))
    assert (ax.get_xlabel(), bool(ax.get_ylabel())) == ("tokens", True)
    assert "NVIDIA H200" in ax.get_title(loc="left") + ax.get_title()
    assert {"loop", "torch_mm"} <= {text.get_text() for text in ax.get_legend().get_texts()}


def test_a_roofline_takes_all_shapes_and_a_breakdown_one_case() -> None:
    ax = moebench.plot(to_frame(family("te") + family("te", dim=64)), "roofline", ax=Figure().add_subplot())
    assert len(ax.lines[0].get_xdata()) == 6
    parts = {"dispatch_ms": 1.0, "compute_ms": 2.0, "combine_ms": 3.0}
    rows = [ok(case(64, ep_size=2), "te", 6.0, name, **parts) for name in ("deepep", "alltoall")]
    ax = moebench.plot(to_frame(rows), "breakdown", ax=Figure().add_subplot())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["te+alltoall", "te+deepep"]


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("throughput", family("te") + family("te", mode="train"), r"differ in: mode \(forward, train\); select one"),
        ("memory", family("te") + family("te", dim=64), "dim"),
        ("roofline", family("te") + family("te", mode="train"), "mode"),
        ("breakdown", family("te", ep_size=2), "num_tokens"),
        ("speed", family("te"), "kind = 'speed': must be one of throughput"),
        ("throughput", [bad(case(64), Status.oom)], "no row has a value"),
    ],
)
def test_what_fits_no_panel_is_said(kind: str, rows: Any, message: str) -> None:
    with pytest.raises(ResultsError, match=message):
        moebench.plot(to_frame(rows), kind)


def test_a_new_figure_leaves_settings_alone() -> None:
    with matplotlib.rc_context({"font.size": 7.0}):
        ax = moebench.plot(to_frame(family("te")))
        assert matplotlib.rcParams["font.size"] == 7.0
    assert not ax.spines["top"].get_visible()
    matplotlib.pyplot.close(ax.figure)


def test_the_package_exports_what_it_says_and_loads_it_late() -> None:
    assert set(moebench.__all__) <= set(dir(moebench))
    assert all(callable(getattr(moebench, name)) for name in moebench.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'speed'"):
        _ = moebench.speed
    code = "import sys, moebench; assert not {'pandas', 'torch', 'matplotlib'} & set(sys.modules); moebench.load"
    code += "; import moebench.cli.compare; assert callable(moebench.compare), 'no module hides a function'"
    subprocess.run([sys.executable, "-c", code], check=True)
