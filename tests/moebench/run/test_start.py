"""A run makes a folder from a plan: what it writes, and what a refused run leaves."""

import json
from pathlib import Path

import pytest

from moebench.results.journal import Journal
from moebench.results.record import Status, record
from moebench.run import start
from moebench.run.request import plan
from moebench.run.runfile import Asked
from moebench.run.runner import Outcome, Refused, RunnerError
from moebench.run.start import start_run
from moebench.workload.case import Case, Job
from tests.moebench.planned import plan_, write_sweep


@pytest.fixture(autouse=True)
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_sweep()


def row():
    case = Case(num_tokens=8, n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8)
    return record(Job(case=case, backend="loop"), Status.oom, run_id="r", env_id="e", detail="much")


def executing(monkeypatch, error=None, rows=()):
    """Replace `execute` with a function that writes these rows and then raises this error, if there is one."""

    def execute(planned, *, on_record, on_environment, time_budget_s, site, earlier):
        assert (site, earlier) == (None, ())
        (planned.folder / "logs").mkdir(exist_ok=True)
        for one in rows:
            Journal(planned.folder / "journal.jsonl").append(one)
            on_record(one)
        if error is not None:
            raise error
        return Outcome(tuple(rows), 0)

    monkeypatch.setattr(start, "execute", execute)


def test_a_run_keeps_what_it_was_asked_for(monkeypatch, sweep):
    executing(monkeypatch, rows=[row()])
    planned = plan_(out=Path("deep/out"))
    told = []
    assert start_run(planned, told.append).records == (row(),)
    assert told == [row()]
    assert (planned.folder / "sweep.toml").read_bytes() == sweep.read_bytes()
    asked = json.loads((planned.folder / "run.json").read_text())
    assert (asked["sweep"], asked["num_jobs"], asked["run_id"]) == ("two", 4, planned.run_id)


def test_a_refused_run_leaves_no_folder(monkeypatch):
    executing(monkeypatch, Refused("no backend x"))
    with pytest.raises(Refused):
        start_run(planned := plan_(out=Path("out")), print)
    assert not planned.folder.exists()


@pytest.mark.parametrize("name", ["link", "."])
def test_a_refused_run_empties_a_folder_that_it_cannot_remove(monkeypatch, tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    if name == ".":
        monkeypatch.chdir("empty")
    planned = plan(str(tmp_path / "two.toml"), Asked(), out=Path(name))
    executing(monkeypatch, Refused("no backend x"))
    with pytest.raises(Refused):
        start_run(planned, print)
    assert list((tmp_path / "link").iterdir()) == []


@pytest.mark.parametrize(("error", "rows"), [(Refused("gone"), [row()]), (RunnerError("broken"), [])])
def test_what_was_measured_and_what_went_wrong_stay(monkeypatch, error, rows):
    executing(monkeypatch, error, rows)
    with pytest.raises(RunnerError):
        start_run(planned := plan_(out=Path("out")), lambda one: None)
    assert (planned.folder / "logs").is_dir()
    assert (planned.folder / "journal.jsonl").exists() == bool(rows)
