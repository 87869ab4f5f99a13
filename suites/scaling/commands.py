"""Measure the CPU time and the memory of commands on synthetic sweeps and results.

    PYTHONPATH=. python suites/scaling/commands.py 20000 100000 --out scaling.json

For each size, the program writes a sweep of so many jobs, and two runs with so many records together: four rounds of a
quarter as many jobs. Each command runs in a process of its own, whose CPU time and largest memory the system reports.
To measure the commands of another revision, put its checkout first in PYTHONPATH and name it with --revision.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from synthetic import jobs, sweep_text, write_run

_ROUNDS = 4
#: The exit codes of commands that did their work. `gate` ends with 1, because noise makes a few of the jobs slower.
_DONE = (0, 1, 3)


@dataclass(frozen=True)
class Measured:
    """The cost of one command. `size` is a number of records, or for `list` and `dry run` a number of jobs."""

    revision: str
    command: str
    size: int
    cpu_s: float
    peak_bytes: int


def write_inputs(folder: Path, size: int) -> None:
    """Write a sweep of `size` jobs, and two runs with `size` records each."""
    (folder / f"{size}.toml").write_text(sweep_text(size))
    of = jobs(size // _ROUNDS)
    for number, name in enumerate(("before", "after"), start=1):
        write_run(folder / f"{name}-{size}", of, num_rounds=_ROUNDS, seed=number)


def commands(size: int) -> dict[str, list[str]]:
    run, sweep = f"after-{size}", f"{size}.toml"
    return {
        "show": ["show", run],
        "report": ["report", run, "--out", "report.html"],
        "gate": ["gate", f"before-{size}", run],
        "list": ["list", sweep],
        "dry run": ["run", sweep, "--dry-run"],
    }


def measure(folder: Path, size: int, revision: str, times: int) -> Iterator[Measured]:
    """Run each command in `folder` so many times, and yield the least that it cost: other programs only add to it.

    Raises SystemExit for a command that fails.
    """
    for name, arguments in commands(size).items():
        costs = [_cost(folder, arguments) for _ in range(times)]
        yield Measured(revision, name, size, *map(min, zip(*costs, strict=True)))


def _cost(folder: Path, arguments: list[str]) -> tuple[float, int]:
    """Return the CPU time in seconds and the largest memory in bytes of one command."""
    command = [sys.executable, "-m", "moebench", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    process = subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in _DONE:
        raise SystemExit(f"{' '.join(arguments)}: exit code {process.returncode}")
    return round(used.ru_utime + used.ru_stime, 2), used.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", type=int, help="numbers of records and of jobs, multiples of 800")
    parser.add_argument("--revision", default="this", help="the name of the measured revision in the document")
    parser.add_argument("--times", type=int, default=1, help="run each command so many times, keep the least cost")
    parser.add_argument("--inputs", type=Path, help="keep the sweeps and the runs in this folder, or take them from it")
    parser.add_argument("--out", type=Path, required=True, help="add the measurements to this JSON file")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.inputs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for size in asked.sizes:
            if not (folder / f"after-{size}").exists():
                write_inputs(folder, size)
            rows = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
            for one in measure(folder, size, asked.revision, asked.times):
                print(f"{one.command}, {one.size}: {one.cpu_s:.1f} s, {one.peak_bytes / 2**20:.0f} MiB", flush=True)
                rows.append(asdict(one))
                asked.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
