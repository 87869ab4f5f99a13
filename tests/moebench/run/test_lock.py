"""One process at a time writes into a results folder."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from moebench.errors import UsageError
from moebench.run import request, start
from moebench.run.lock import locked
from moebench.run.runfile import Asked
from tests.moebench import stand_in
from tests.moebench.planned import plan_, write_sweep
from tests.moebench.resumed import is_whole, refused, until_records


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_sweep()


def test_an_empty_folder_may_be_named(sweep, tmp_path):
    (tmp_path / "out").mkdir()
    assert plan_(out=Path("out")).folder == Path("out")
    (tmp_path / "out" / "x").touch()
    with pytest.raises(UsageError, match="--out out"):
        plan_(out=Path("out"))


def test_a_lock_fills_no_folder_but_somebodys_logs_do(sweep, tmp_path):
    with locked(Path("out")):
        assert plan_(out=Path("out")).folder == Path("out")
        (tmp_path / "out" / "logs" / "diary.txt").touch()
        with pytest.raises(UsageError, match="--out out"):
            plan_(out=Path("out"))


def test_two_runs_into_one_folder(folder, moebench):
    process = stand_in.started(folder / "waits", "run", "tiny.toml", "--out", "out", cwd=folder)
    until_records(process, folder / "out")
    assert refused(moebench("run", "--resume", "out"), f"out: process {process.pid} is writing into it")
    (folder / "go").touch()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (0, "")
    assert is_whole(folder / "out")


def test_two_new_runs_into_one_folder(folder):
    """Both runs found the folder empty. The second to begin is refused, at once or after the first has ended."""
    plan = request.plan("tiny.toml", Asked(device="cpu"), out=Path("out"), time_budget_min=0.0)
    with locked(Path("out")), pytest.raises(UsageError, match=f"out: process {os.getpid()} is writing into it"):
        start.start_run(plan, print)
    Path("out/journal.jsonl").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        start.start_run(plan, print)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(sweep, monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError, match=r"^out: its file system cannot lock files, .*--out$"), locked(Path("out")):
        pass
