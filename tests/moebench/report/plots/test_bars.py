"""The bars show dispatch, compute, combine and backward beside the whole time, at the counts that compare the most."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moebench.report.plots.figures import breakdown, draw, write_plots
from moebench.results.frame import to_frame
from moebench.results.record import Record, Status
from tests.moebench.drawn import bad, case, family, figures_of, legend, ok, only, panels, texts

PARTS = ("dispatch", "compute", "combine", "backward")
WHOLE = "time of the pass; red: over 10% apart"
COUNTS = (16, 128, 1024, 4096, 16384)


def row(count: int, backend: str = "te", dispatcher: str = "deepep", scale: float = 1.0, **fields: Any) -> Record:
    parts = {"dispatch_ms": 0.5 * scale, "compute_ms": 2.0 * scale, "combine_ms": 0.75 * scale}
    is_train = fields.get("mode") == "train"
    parts |= {"backward_ms": 4.0 * scale} if is_train else {}
    return ok(case(count, ep_size=2, **fields), backend, (7.5 if is_train else 3.5) * scale, dispatcher, **parts)


def rows(counts: tuple[int, ...] = COUNTS, **fields: Any) -> list[Record]:
    pairs = [(backend, dispatcher) for backend in ("te", "loop") for dispatcher in ("deepep", "alltoall")]
    return [
        row(count, backend, dispatcher, scale=count / 64 + at, **fields)
        for count in counts
        for at, (backend, dispatcher) in enumerate(pairs)
    ]


def bars(ax: Axes) -> dict[str, list[tuple[float, float]]]:
    """Return the start and length of each line's parts, by line, from the top."""
    labels = [text.get_text() for text in ax.get_yticklabels()]
    found: dict[str, list[tuple[float, float]]] = {label: [] for label in labels}
    assert [container.get_label() for container in ax.containers] == list(PARTS)
    for container in ax.containers:
        for label, bar in zip(labels, container, strict=True):
            found[label].append((bar.get_x(), bar.get_width()))
    return found


def test_bars_are_dispatch_compute_and_combine_end_to_end_at_a_middle_and_the_largest_count() -> None:
    figure = only(breakdown(to_frame(rows())))
    shown = panels(figure)
    assert list(shown) == ["1K tokens per rank", "16K tokens per rank"]
    drawn = bars(shown["16K tokens per rank"])
    assert list(drawn) == ["loop+alltoall", "loop+deepep", "te+alltoall", "te+deepep"]
    assert drawn["te+deepep"] == [(0, 128.0), (128.0, 512.0), (640.0, 192.0), (832.0, 0)]
    assert drawn["loop+alltoall"] == [(0, 129.5), (129.5, 518.0), (647.5, 194.25), (841.75, 0)]
    assert [text.get_text() for text in shown["1K tokens per rank"].texts] == ["61.8", "58.5", "55.2", "52.0"]
    assert legend(figure) == [*PARTS, WHOLE]
    assert texts(figure)[0] == "Breakdown: e8k2d256i512, bfloat16, swiglu, EP 2"
    assert shown["16K tokens per rank"].get_xlabel() == "ms on the slowest rank"


def test_the_middle_count_is_one_that_most_backends_have() -> None:
    some = [one for one in rows() if one.num_tokens == 4096 or one.backend == "te"]
    shown = panels(only(breakdown(to_frame(some))))
    assert [len(bars(ax)) for ax in shown.values()] == [4, 2]
    assert list(shown) == ["4K tokens per rank", "16K tokens per rank"]


def test_one_process_has_no_breakdown() -> None:
    assert breakdown(to_frame(family("loop") + family("te"))) == []
    assert breakdown(to_frame([])) == []
    unheard = [ok(case(count, ep_size=2), "mine:Own", dispatcher="alltoall") for count in COUNTS]
    unheard += [ok(case(1024, ep_size=2, mode="train"), "peer_automodel_te", 3.0, "deepep", backward_ms=2.0)]
    assert breakdown(to_frame(unheard)) == [], "a module of others may have no dispatcher to listen to"
    both = panels(only(breakdown(to_frame([*unheard, row(1024, mode="train")]))))
    assert [list(bars(ax)) for ax in both.values()] == [["te+deepep"]]


def test_modes_routings_and_loads_have_panels() -> None:
    some = rows((128, 1024)) + rows((128, 1024), mode="train") + rows((128, 1024), routing="zipf", rank_load="uneven")
    some += [row(1024, "te_fp8_block", mode="train")]
    shown = panels(only(breakdown(to_frame(some))))
    assert [title.replace("\n", " ") for title in shown] == [
        "128 tokens per rank, uniform, forward",
        "1K tokens per rank, uniform, forward",
        "128 tokens per rank, zipf, uneven ranks, forward",
        "1K tokens per rank, zipf, uneven ranks, forward",
        "128 tokens per rank, uniform, train",
        "1K tokens per rank, uniform, train",
    ]
    assert "te_fp8_block+deepep" in bars(shown["1K tokens per rank, uniform, train"])
    assert "te_fp8_block+deepep" not in bars(shown["1K tokens per rank, uniform, forward"])


def test_a_train_step_ends_with_its_backward() -> None:
    shown = panels(only(breakdown(to_frame(rows((64, 128), mode="train")))))
    drawn = bars(shown["64 tokens per rank"])
    assert drawn["te+deepep"] == [(0, 0.5), (0.5, 2.0), (2.5, 0.75), (3.25, 4.0)]


def test_the_whole_time_stands_beside_the_parts_and_a_sum_that_is_over_10_percent_apart_is_red() -> None:
    """The parts are 3.25 ms together. A time of 3 ms is 8% away, and a time of 2.9 ms is 12% away."""
    times = {"loop": 3.0, "te": 2.9, "gmm": 3.7}
    some = [
        row(count, name).model_copy(update={"time_ms": time, "time_ms_low": time, "time_ms_high": time})
        for count in (64, 128)
        for name, time in times.items()
    ]
    ax = panels(only(breakdown(to_frame(some))))["64 tokens per rank"]
    assert [text.get_text() for text in ax.texts] == ["3.25", "3.25 ≠ 3.70", "3.25 ≠ 2.90"]
    assert len({text.get_color() for text in ax.texts}) == 2
    (marks,) = ax.collections
    assert [segment[0][0] for segment in marks.get_segments()] == [3.0, 3.7, 2.9]


def test_a_run_of_train_alone_is_shown() -> None:
    figure = only(breakdown(to_frame(rows(mode="train"))))
    assert list(panels(figure)) == ["1K tokens per rank", "16K tokens per rank"]
    assert "train" in texts(figure)[1]


def test_what_failed_is_a_gap_and_is_named() -> None:
    some = [one for one in rows((128, 1024)) if (one.num_tokens, one.backend, one.dispatcher) != (1024, "te", "deepep")]
    wrong = bad(case(1024, ep_size=2), Status.mismatch, "te", "deepep", parity_worst=7.0)
    figure = only(breakdown(to_frame([*some, wrong])))
    drawn = bars(panels(figure)["1K tokens per rank"])
    assert np.isnan([length for _, length in drawn["te+deepep"]]).all()
    assert not panels(figure)["1K tokens per rank"].texts[-1].get_text().startswith("nan")
    assert not np.isnan([length for _, length in drawn["te+alltoall"]]).any()
    assert "Not drawn: te+deepep mismatch ×1" in texts(figure)


def test_several_seeds_meet_in_their_median() -> None:
    some = [row(count, scale=scale, seed=seed) for count in (128, 256) for seed, scale in enumerate((1.0, 2.0, 9.0))]
    shown = panels(only(breakdown(to_frame(some))))
    assert bars(shown["256 tokens per rank"])["te+deepep"] == [(0, 1.0), (1.0, 4.0), (5.0, 1.5), (6.5, 0)]


def test_a_case_of_its_own_has_a_panel_in_the_overview_of_its_ep_size() -> None:
    some = [row(64, dtype="float32"), row(64, expert_bias=True), row(64, "loop", "alltoall", expert_bias=True)]
    failed = bad(case(64, ep_size=2, dtype="float16"), Status.unsupported, "te", "deepep")
    ((slug, figure),) = figures_of(breakdown(to_frame([*some, failed]))).items()
    assert slug == "breakdown-overview-ep-2"
    assert {title.replace("\n", " "): list(bars(ax)) for title, ax in panels(figure).items()} == {
        "bfloat16, swiglu+bias": ["loop+alltoall", "te+deepep"],
        "float32, swiglu": ["te+deepep"],
    }
    assert "Not drawn: te+deepep unsupported ×1" in texts(figure)


def test_an_overview_of_many_cases_has_several_pages_of_readable_height() -> None:
    shown = figures_of(
        breakdown(to_frame([one for seed in range(40) for one in rows((64,), dim=64 + 8 * seed)]))
    ).values()
    assert len(shown) > 1
    assert sum(len(figure.axes) for figure in shown) == 40
    assert all(height(figure) < 14 for figure in shown)


def height(figure: Figure) -> float:
    return float(figure.get_size_inches()[1])


def test_the_breakdown_is_written_the_same_each_time_and_removed_when_it_is_gone(tmp_path: Path) -> None:
    frame = to_frame(rows((128, 1024)))
    name = "breakdown-e8k2d256i512-bfloat16-swiglu-ep-2.svg"
    written = write_plots(draw(frame, ("svg",)), tmp_path)
    assert tmp_path / name in written
    first = (tmp_path / name).read_bytes()
    write_plots(draw(frame, ("svg",)), tmp_path)
    assert (tmp_path / name).read_bytes() == first
    (tmp_path / "breakdown.svg").write_bytes(b"mine")
    write_plots(draw(to_frame(family("loop")), ("svg",)), tmp_path)
    assert not (tmp_path / name).exists()
    assert (tmp_path / "breakdown.svg").exists()


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA B200"])
def test_machines_have_figures_of_their_own(gpu: str) -> None:
    other = to_frame(rows((128, 1024))).assign(gpu=gpu)
    both = breakdown(pd.concat([to_frame(rows((128, 1024))), other], ignore_index=True))
    assert len(both) == (1 if gpu == "NVIDIA H200" else 2)
