"""moebench makes tables, plots and the page from a folder's journal."""

import os
import signal
from pathlib import Path

import pytest

from moebench.errors import PictureError
from moebench.report.folder import draw_plots, finish, rewrite, write_report
from moebench.report.plots import figures
from moebench.report.plots.figures import Drawn
from moebench.results import frame
from moebench.results.journal import Journal
from moebench.results.record import Status, record
from moebench.workload.case import Case, Job
from tests.moebench.planned import write_sweep


@pytest.fixture(autouse=True)
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_sweep()


def row():
    case = Case(num_tokens=8, n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8)
    return record(Job(case=case, backend="loop"), Status.oom, run_id="r", env_id="e", detail="much")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_results_are_written_leaves_no_part_of_a_file(monkeypatch, number):
    Path("out").mkdir()
    Journal(Path("out/journal.jsonl")).append(row())
    before = signal.getsignal(number)
    monkeypatch.setattr(frame.os, "fsync", lambda descriptor: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        finish(Path("out"))
    assert signal.getsignal(number) is before
    assert [path.name for path in Path("out").iterdir() if "results" in path.name or "tmp" in path.name] == []


def test_results_are_written_before_any_plot_is_tried(monkeypatch):
    """A plot that ends the process, and then plots that cannot be drawn."""
    Path("out").mkdir()
    Journal(Path("out/journal.jsonl")).append(row())

    def end(frame):
        raise SystemExit

    monkeypatch.setattr(figures, "draw", end)
    with pytest.raises(SystemExit):
        finish(Path("out"))
    assert {path.name for path in Path("out").iterdir()} == {"journal.jsonl", "results.parquet", "results.csv"}
    failed = Drawn({}, ["plot a: cannot be drawn: why"])
    monkeypatch.setattr(figures, "draw", lambda *arguments: failed)
    written = finish(Path("out"))
    assert Path("out/report.html") in written.paths
    assert written.failures == ("plot a: cannot be drawn: why",)
    with pytest.raises(PictureError, match="plot a: cannot"):
        written.check()
    for again in (rewrite(Path("out")), draw_plots(Path("out")), write_report(Path("out"), None, None)):
        assert again.failures == written.failures


def test_tables_plots_and_report_come_of_the_journal():
    Path("out").mkdir()
    assert finish(Path("out")).paths == ()
    Journal(Path("out/journal.jsonl")).append(row())
    written = finish(Path("out")).paths
    assert {Path(f"out/{name}") for name in ("results.parquet", "results.csv", "report.html")} <= set(written)
    assert all(path.is_file() for path in written)
