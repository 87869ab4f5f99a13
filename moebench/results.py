"""A results folder from its plan to its tables and plots. No torch here."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moebench import __version__
from moebench.case import Job
from moebench.frame import load, write, write_atomically
from moebench.plots import write_plots
from moebench.record import Journal
from moebench.runner import Plan, new_run_id
from moebench.spec import SweepError, SweepSpec, filter_jobs, find_sweep, load_sweep, select_backends

RUNS = Path("results") / "runs"
DEVICES = ("cpu", "cuda")


class UsageError(Exception):
    """Something asked for that cannot be: what, which value, the rule, the remedy, in one line."""


@dataclass(frozen=True)
class RunPlan:
    """What a run is asked to do: the jobs, and the file they come from."""

    sweep: SweepSpec
    sweep_file: Path
    execution: Plan

    @property
    def jobs(self) -> tuple[Job, ...]:
        return self.execution.jobs

    @property
    def folder(self) -> Path:
        return self.execution.folder


def plan(
    sweep: str,
    *,
    out: Path | None,
    backends: Sequence[str],
    filters: Sequence[str],
    case_ids: Sequence[str],
    device: str | None,
    time_budget_min: float | None,
) -> RunPlan:
    """Everything that can be known to be wrong is said here, before anything runs. Raises SweepError, UsageError."""
    _check_device(device)
    sweep_file = find_sweep(sweep)
    jobs = select(sweep, backends, filters, case_ids)
    spec = load_sweep(sweep_file)
    run_id = new_run_id(spec.name)
    folder = out or RUNS / run_id
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--out {folder}: it exists and is not an empty folder; name a new one")
    budget_s = None if time_budget_min is None else time_budget_min * 60
    return RunPlan(spec, sweep_file, Plan(jobs, spec.policy, folder, run_id, device, budget_s))


def select(sweep: str, backends: Sequence[str], filters: Sequence[str], case_ids: Sequence[str]) -> tuple[Job, ...]:
    """The jobs of a sweep that a command line selects. Raises SweepError, also where none is left."""
    jobs = filter_jobs(select_backends(load_sweep(find_sweep(sweep)).jobs(), backends), filters)
    unknown = sorted(set(case_ids) - {job.case.case_id for job in jobs})
    if unknown:
        raise SweepError(
            [f"case {case_id!r}: {sweep} has none of that id; see `moebench list {sweep}`" for case_id in unknown]
        )
    chosen = tuple(job for job in jobs if not case_ids or job.case.case_id in case_ids)
    if not chosen:
        raise SweepError([f"{sweep}: no job is left by {' '.join(filters)}; see `moebench list {sweep}`"])
    return chosen


def _check_device(device: str | None) -> None:
    if device is None:
        return
    kind, _, index = device.partition(":")
    if kind not in DEVICES or (index and not (kind == "cuda" and index.isdecimal())):
        raise UsageError(f"--device {device}: it must be cpu, cuda or cuda:N")


def begin(run_plan: RunPlan) -> None:
    """Make the folder, with the sweep and what was asked for beside the results to come."""
    run_plan.folder.mkdir(parents=True, exist_ok=True)
    asked = {
        "run_id": run_plan.execution.run_id,
        "moebench": __version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["moebench", *sys.argv[1:]]),
        "sweep": run_plan.sweep.name,
        "num_jobs": len(run_plan.jobs),
    }
    write_atomically(run_plan.folder / "run.json", (json.dumps(asked, indent=2) + "\n").encode())
    write_atomically(run_plan.folder / "sweep.toml", run_plan.sweep_file.read_bytes())


def finish(folder: Path) -> list[Path]:
    """Parquet, CSV and plots from the journal. What was measured before an interruption counts too."""
    if not Journal(folder / "journal.jsonl").path.exists():
        return []
    return [*write(load(folder), folder), *draw(folder)]


def draw(folder: Path) -> list[Path]:
    """Draw the plots of a results folder, or of a Parquet file beside it."""
    return write_plots(load(folder), (folder if folder.is_dir() else folder.parent) / "plots")
