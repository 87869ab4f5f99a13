"""Measure how many jobs a second the supervisor hands out and records, with stand-ins for the workers.

    PYTHONPATH=. python suites/scaling/supervisor.py --seconds 10 5 2 1 0 --out supervisor.json

The supervisor is the real one: it starts the workers, gives them jobs, checks their events and writes the journal. The
workers are stand-ins of `standins.py`, which do nothing but answer. Each number of seconds makes a run of its own, in
which a job takes that long on average. At 0 seconds, the workers answer at once.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from standins import launcher
from synthetic import jobs

from moebench.machine.gpus import Slot
from moebench.results.journal import JOURNAL_NAME
from moebench.results.record import Record
from moebench.run import supervisor
from moebench.run.plan import Plan
from moebench.run.runner import execute
from moebench.workload.spec import Policy

_SERVERS = 4
_POLICY = Policy(timeout_s=3600.0)


@dataclass(frozen=True)
class Measured:
    """The speed of the supervisor in one run.

    `jobs_per_s` and `cpu_share` are those of the time in which all workers work, and `cpu_share` is the part of one
    core that the supervisor uses. `wait_ms` is how long a worker waited from the end of a job to the next, in the
    median, and `wait_99_ms` is how long the slowest hundredth waited at least. `start_s` is the time until each
    worker has ended two jobs.
    """

    revision: str
    num_workers: int
    num_jobs: int
    job_s: float
    jobs_per_s: float
    cpu_share: float
    cpu_ms_per_job: float
    wait_ms: float
    wait_99_ms: float
    start_s: float
    peak_bytes: int


@contextmanager
def _servers(folder: Path, num_servers: int, seconds: float, waits: list[float]) -> Iterator[None]:
    """Serve the workers in the block. At its end, add the time that each worker waited for each job to `waits`."""
    command = [sys.executable, str(Path(__file__).with_name("standins.py"))]
    servers = [
        subprocess.Popen([*command, str(folder / str(number)), str(seconds)], stdout=subprocess.PIPE, text=True)
        for number in range(num_servers)
    ]
    try:
        for server in servers:
            assert server.stdout is not None
            server.stdout.readline()
        yield
    finally:
        for server in servers:
            server.terminate()
            waits += json.loads(server.communicate()[0] or "[]")


def measure(
    folder: Path, num_workers: int, num_jobs: int, job_s: float, revision: str = "this", num_servers: int = _SERVERS
) -> Measured:
    """Run the jobs with stand-ins. Raises SystemExit unless the journal has each job once."""
    program = launcher(folder, num_servers)
    supervisor.sys = SimpleNamespace(executable=str(program))  # type: ignore[attr-defined]
    slots = tuple(Slot(f"GPU-{number}") for number in range(num_workers))
    plan = Plan(tuple(jobs(num_jobs)), _POLICY, folder / "run", "supervisor", slots=slots)
    waits: list[float] = []
    marks: list[tuple[int, float, float]] = []  # after every so many records: their number, the time, the CPU time
    numbers, every = itertools.count(1), max(1, num_jobs // 200)

    def count(row: Record) -> None:
        if not (number := next(numbers)) % every:
            marks.append((number, time.monotonic(), time.process_time()))

    with _servers(folder, num_servers, job_s, waits):
        began = time.monotonic()
        rows = execute(plan, on_record=count).records
    num_lines, num_measured = (plan.folder / JOURNAL_NAME).read_bytes().count(b"\n"), len({row.key for row in rows})
    if {num_measured, num_lines} != {num_jobs}:
        raise SystemExit(f"{num_jobs} jobs, but {num_measured} are measured, and the journal has {num_lines} lines")
    begun = next(mark for mark in marks if mark[0] >= min(2 * num_workers, num_jobs // 3))
    last = next(mark for mark in reversed(marks) if mark[0] <= num_jobs - min(2 * num_workers, num_jobs // 3))
    num_done, wall_s, cpu_s = (end - start for start, end in zip(begun, last, strict=True))
    return Measured(
        revision,
        num_workers,
        num_jobs,
        job_s,
        round(num_done / wall_s, 1),
        round(cpu_s / wall_s, 3),
        round(1e3 * cpu_s / num_done, 3),
        round(1e3 * float(np.median(waits)), 2),
        round(1e3 * float(np.quantile(waits, 0.99)), 2),
        round(begun[1] - began, 1),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=100_000, help="a multiple of 200")
    parser.add_argument("--servers", type=int, default=_SERVERS, help="processes that serve the workers")
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.0], help="how long a job takes on average")
    parser.add_argument("--revision", default="this", help="the name of the measured revision in the document")
    parser.add_argument("--out", type=Path, help="add the measurements to this JSON file")
    asked = parser.parse_args()
    for job_s in asked.seconds:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), asked.workers, asked.jobs, job_s, asked.revision, asked.servers)
        print(json.dumps(asdict(found)), flush=True)
        if asked.out is not None:
            rows = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
            asked.out.write_text(json.dumps({"rows": [*rows, asdict(found)]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
