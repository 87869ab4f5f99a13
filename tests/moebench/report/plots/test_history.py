"""The plot of one case over several results, in the order of their runs."""

import pytest

from moebench.errors import PictureError, ResultsError, UsageError
from moebench.report.plots import history as plot
from moebench.report.plots.history import draw_history, figure_of
from moebench.results.history import history
from moebench.results.record import Status
from tests.moebench.drawn import texts
from tests.moebench.gated import bad, frame, job_of, ok

CASE = job_of(8)
OTHER = job_of(8, "torch_mm")


def result(day, *times, env_id="e"):
    run = {"run_id": f"202611{day:02}-101500-a", "env_id": env_id, "time_ms_low": None}
    rows = [
        bad(job, Status.oom, run_id=run["run_id"]) if time is None else ok(job, [time], **run, time_ms_high=2 * time)
        for job, time in zip((CASE, OTHER), times, strict=False)
    ]
    return frame(*rows, ok(job_of(16), [9.0]))


@pytest.fixture(scope="module")
def rows():
    results = {
        "third": result(3, 2.0, 8.0, env_id="f"),
        "first": result(1, 1.0),
        "second": result(2, None, 4.0),
        "fourth": result(4, 3.0, 8.0, env_id="f"),
    }
    return history(CASE.case.case_id, results)


def test_the_plot_shows_each_backend_and_where_the_machine_changed(rows):
    (ax,) = figure_of(rows).axes
    drawn = {line.get_color(): line.get_ydata() for line in ax.lines if len(line.get_xdata()) > 2}
    assert sorted(len(values) for values in drawn.values()) == [3, 4]
    dotted = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"]
    assert dotted == [1.5]
    bottom, top = ax.get_ylim()
    assert bottom < 0 < 2.0 < top
    assert next(text.get_text() for text in ax.get_xticklabels()) == "2026-11-01\n10:15"
    assert "change" in ax.get_ylabel()


def test_a_case_without_a_time_has_a_plot_that_says_why(tmp_path):
    none = history(CASE.case.case_id, {"a": result(1, None)})
    assert "Not drawn: loop oom ×1" in texts(figure_of(none))
    draw_history(none, tmp_path / "a.svg")


def test_a_plot_that_cannot_be_drawn_or_written_is_one_line(rows, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"a\.png: cannot be written: No such file"):
        draw_history(rows, tmp_path / "gone" / "a.png")
    monkeypatch.setattr(plot, "figure_of", lambda rows: [][0])
    with pytest.raises(PictureError, match="plot a: cannot be drawn: IndexError: list index out of range; every"):
        draw_history(rows, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_plot_is_written_by_its_suffix(rows, tmp_path):
    for name in ("a.png", "a.svg"):
        draw_history(rows, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(ResultsError, match="a plot is written as"):
        draw_history(rows, tmp_path / "a.pdf")
