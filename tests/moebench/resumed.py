"""Run jobs, end the run early and resume it; see which jobs ran and which are left."""

import subprocess
import time
from contextlib import suppress

import psutil
import pytest

from moebench.results.journal import Journal

SWEEP = """
name = "tiny"

[policy]
time_cap_s = 0.01
interval_target = 0.9

[[grid]]
n_routed_experts = 4
n_activated_experts = 2
dim = 16
moe_inter_dim = 8
num_tokens = [8, 16, 24]
dtype = "float32"
backend = ["loop", "torch_mm"]
"""
#: A worker that measures until its second job, then waits until a file exists.
WAITS = """ready()
done(0)
start(1)
while not os.path.exists("go"): time.sleep(0.01)
say(told(1))
for number in itertools.count(2): done(number)
"""
#: A worker that interrupts its supervisor once the supervisor has kept its first record.
TOLD_AND_INTERRUPTS = """ready()
done(0)
while not os.path.exists("out/journal.jsonl"): time.sleep(0.01)
os.kill(os.getppid(), signal.SIGTERM)
hang()
"""


def rows(folder):
    found, torn = Journal(folder / "journal.jsonl").read()
    assert torn == 0
    return found


def until_records(process, folder, count=1):
    """Wait until the run has recorded this many jobs; it must not end by itself."""
    deadline = time.monotonic() + 90
    while not (folder / "journal.jsonl").exists() or (folder / "journal.jsonl").read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
            pytest.fail(f"it ended by itself: {process.communicate()}")
    return psutil.Process(process.pid).children(recursive=True)


def are_gone(processes):
    def is_alive(process):
        with suppress(psutil.NoSuchProcess):
            return process.status() != psutil.STATUS_ZOMBIE
        return False

    deadline = time.monotonic() + 30
    while any(is_alive(process) for process in processes) and time.monotonic() < deadline:
        psutil.wait_procs(processes, timeout=0.05)
    return not any(is_alive(process) for process in processes)


def is_whole(folder, backends=("loop", "torch_mm"), tokens=(8, 16, 24), rounds=1):
    """Whether every job of every round has exactly one record."""
    wanted = [(t, name, n) for t in tokens for name in backends for n in range(rounds)]
    assert sorted((row.num_tokens, row.backend, row.round) for row in rows(folder)) == sorted(wanted)
    return True


def begun(moebench):
    """Start a run in `out` that ends before it measures anything."""
    assert moebench("run", "tiny.toml", "--out", "out", "--device", "cpu", "--time-budget", 0).code == 0


def refused(found, *words):
    assert (found.code, found.out) == (2, "")
    (line,) = found.err.splitlines()
    for word in words:
        assert word in line
    return True
