"""Fixtures for runs with stand-ins in place of workers."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moebench.cli import app
from moebench.report import folder as report
from moebench.run import supervisor
from tests.moebench import stand_in
from tests.moebench.executed import python_path, share_workers
from tests.moebench.resumed import SWEEP, WAITS

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A new folder with a sweep and two stand-ins for workers. It is the working directory of this process."""
    (tmp_path / "tiny.toml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", python_path(ROOT))
    stand_in.write(tmp_path / "waits", WAITS)
    stand_in.write(tmp_path / "works", stand_in.ALL)
    return tmp_path


@pytest.fixture
def moebench(capsys, monkeypatch, folder):
    """A function that runs the command line in this process, with a stand-in for its workers.

    It draws no plots and writes no page, about which the tests of this folder say nothing.
    """
    monkeypatch.setattr(
        report, "_with_plots", lambda frame, folder, before, after=(): report.Written((*before, *after))
    )

    def call(*arguments, worker="works"):
        monkeypatch.setattr(supervisor, "sys", SimpleNamespace(executable=str(folder / worker)))
        monkeypatch.setattr(sys, "argv", ["moebench", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            app.main()
        printed = capsys.readouterr()
        return SimpleNamespace(code=end.value.code or 0, out=printed.out, err=printed.err.strip())

    return call


@pytest.fixture(name="stand_in")
def stand_in_for_workers(custom_stand_in, monkeypatch):
    """A function that takes a worker's script and makes `execute` start it in place of the worker.

    All backends count as built in.
    """
    share_workers(monkeypatch)
    return custom_stand_in


@pytest.fixture
def custom_stand_in(tmp_path, monkeypatch):
    """A function like that of `stand_in`. Only the backends of the catalog count as built in."""
    monkeypatch.setenv("PYTHONPATH", python_path(ROOT))

    def write(script):
        path = stand_in.write(tmp_path / "stand-in", script)
        monkeypatch.setattr(supervisor, "sys", SimpleNamespace(executable=str(path)))

    return write
