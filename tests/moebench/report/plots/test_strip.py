"""One small figure has the parity error of every job, with one row for each backend."""

import pandas as pd
import pytest

from moebench.report.plots.figures import parity
from moebench.results.frame import to_frame
from moebench.results.record import Status
from tests.moebench.drawn import bad, case, family, figures_of, legend, line, ok, only


def test_a_row_of_marks_for_each_backend_and_a_cross_for_each_mismatch() -> None:
    rows = [
        *(ok(case(count), "gmm", parity_worst=error) for count, error in ((64, 0.25), (256, 0.5))),
        ok(case(64, ep_size=2), "te", 1.0, "alltoall", parity_worst=0.125),
        ok(case(64, dtype="float32"), "loop", parity_worst=0.75),
        bad(case(512), Status.mismatch, "te", parity_worst=37.0),
    ]
    figure = only(parity(to_frame(rows)))
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["loop", "gmm", "te"], "the reference comes first"
    assert list(zip(*line(ax, "gmm").get_data(), strict=True)) == [(0.25, 1), (0.5, 1)]
    assert list(zip(*line(ax, "te").get_data(), strict=True)) == [(0.125, 2)]
    assert list(zip(*line(ax, "mismatch").get_data(), strict=True)) == [(37.0, 2)]
    assert set(line(ax, "budget").get_xdata()) == {1.0}
    assert legend(figure) == ["budget", "mismatch"]
    assert figure.get_size_inches()[1] < 4


def test_what_was_never_judged_has_no_mark_and_is_named() -> None:
    (ax,) = only(parity(to_frame([*family("loop"), bad(case(64), Status.crash, "te")]))).axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["loop", "te"]
    assert "te" not in [drawn.get_label() for drawn in ax.lines]


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA B200"])
def test_machines_have_figures_of_their_own(gpu: str) -> None:
    other = to_frame(family("te")).assign(gpu=gpu)
    both = figures_of(parity(pd.concat([to_frame(family("loop")), other], ignore_index=True)))
    assert list(both) == ["parity-overview", "parity-overview-2"][: 1 if gpu == "NVIDIA H200" else 2]
