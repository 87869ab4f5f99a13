"""A signal at any moment of a run loses no row, and no row is measured twice after the run is resumed.

The workers are stand-ins that take a little time for each job.
"""

import itertools
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from moebench import __main__
from moebench.report import folder as report
from moebench.report.folder import Written
from tests.moebench import stand_in
from tests.moebench.executed import pid_of
from tests.moebench.resumed import are_gone, is_whole, rows

ROOT = Path(__file__).parents[3]
SLOW = """ready()
for number in itertools.count():
    start(number)
    time.sleep(0.03)
    say(told(number))
"""
#: A moment of a run -> the file in the results folder, and the text that appears in it.
MOMENTS = {
    "start": ("logs/worker-0.jobs.jsonl", "run_id"),
    "ready": ("logs/worker-0.events.jsonl", '"ready"'),
    "job begun": ("logs/worker-0.events.jsonl", '"number": 2'),
    "job ended": ("journal.jsonl", '"num_tokens":16'),
    "finish": ("journal.jsonl", '"num_tokens":24,"n_routed_experts":4'),
}
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL")


@pytest.fixture
def begin(folder):
    """A function that starts a run in `out` with slow workers, in a process of its own."""
    stand_in.write(folder / "slow", SLOW)

    def start():
        return stand_in.started(folder / "slow", "run", "tiny.toml", "--out", "out", "--device", "cpu", cwd=folder)

    return start


def lines(folder):
    """Return how many lines the journal and the events of all workers have together."""
    files = [folder / "journal.jsonl", *folder.glob("logs/*.events.jsonl")]
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def until(process, is_so):
    """Wait until something is so, or the run has ended."""
    while process.poll() is None and not is_so():
        time.sleep(0.002)


def resumed(moebench, folder):
    """Resume the run until nothing is left, and check that every row is there once, those of before unchanged."""
    before = rows(folder) if (folder / "journal.jsonl").exists() else []
    found = moebench("run", "--resume", "out")
    assert found.code in (0, 1), found.err
    assert rows(folder)[: len(before)] == before
    return is_whole(folder)


def without_pictures(monkeypatch):
    monkeypatch.setattr(report, "finish", lambda folder: Written())


@pytest.mark.certify
@pytest.mark.timeout(900)
def test_a_signal_at_a_named_line_loses_nothing(certify, tmp_path, begin, moebench, monkeypatch):
    without_pictures(monkeypatch)
    pairs = list(itertools.product(SIGNALS, MOMENTS))
    for name, moment in pairs if certify else random.Random(7).sample(pairs, 1):
        process, (file, text) = begin(), MOMENTS[moment]
        out = tmp_path / "out"
        until(process, lambda at=out / file, text=text: at.exists() and text in at.read_text(errors="replace"))
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        with suppress(ProcessLookupError):
            process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=100)
        assert process.returncode in (0, 130, -signal.SIGKILL), (name, moment, err)
        assert "Traceback" not in err, (name, moment, err)
        assert are_gone(workers)
        assert resumed(moebench, out), (name, moment)
        out.rename(tmp_path / f"{name}-{moment}")


@pytest.mark.certify
@pytest.mark.timeout(1800)
def test_kills_drawn_by_seed_lose_nothing(certify, tmp_path, begin, moebench, monkeypatch):
    """The supervisor or its worker is killed as soon as journal and events have a number of lines that is drawn."""
    without_pictures(monkeypatch)
    draw = random.Random(20261129)
    for number in range(50 if certify else 2):
        count, is_worker = draw.randrange(1, 20), draw.random() < 0.3
        process, out = begin(), tmp_path / "out"
        until(process, lambda out=out, count=count: lines(out) >= count)
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if is_worker:
                psutil.Process(pid_of(out)).kill()
            else:
                process.kill()
        _, err = process.communicate(timeout=100)
        assert "Traceback" not in err, (number, err)
        assert resumed(moebench, out), number
        out.rename(tmp_path / f"killed-{number}")


INTERRUPTED_IMPORT = """
import sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "moebench.cli.app":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from moebench.__main__ import main
main()
"""


def test_ctrl_c_while_the_command_line_is_imported_is_one_line():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_the_program_imports_nothing_before_it_heeds_ctrl_c():
    """The installed program imports this module, so it must not import the command line by itself."""
    text = (ROOT / "pyproject.toml").read_text()
    assert 'moebench = "moebench.__main__:main"' in text
    assert not hasattr(__main__, "app")
