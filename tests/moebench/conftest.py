"""Fixtures that run the command line in this process, and results folders to give it."""

import sys
from types import SimpleNamespace

import pytest

from moebench.cli import app
from moebench.results.journal import Journal
from tests.moebench.gated import job_of, ok, steady


@pytest.fixture
def moebench(capsys, monkeypatch, tmp_path):
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["moebench", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            app.main()
        printed = capsys.readouterr()
        return SimpleNamespace(code=end.value.code or 0, out=printed.out, err=printed.err)

    return call


@pytest.fixture
def folders(tmp_path):
    """Write six results folders.

    `same` and `again` are alike. `slow` is slower. `one` has one round. `other` has another case. `empty` has nothing.
    """
    job = job_of(64)
    rows = {
        "same": ok(job, steady()),
        "again": ok(job, steady(seed=1)),
        "slow": ok(job, steady(time_ms=1.04)),
        "one": ok(job, [1.0]),
        "other": ok(job_of(128), steady()),
    }
    for name, row in rows.items():
        (tmp_path / name).mkdir()
        Journal(tmp_path / name / "journal.jsonl").append(row)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "journal.jsonl").touch()
    return tmp_path
