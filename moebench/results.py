"""A results folder from its plan to its tables and plots. No torch here."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from moebench import __version__
from moebench.case import Job
from moebench.frame import JOURNAL_NAME, load, write, write_atomically
from moebench.plots import all_figures, image, write_plots
from moebench.record import Record
from moebench.report import REPORT_NAME, page
from moebench.rounds import shuffled
from moebench.runner import Outcome, Plan, Refused, execute, new_run_id
from moebench.selection import select
from moebench.spec import SweepSpec, find_sweep, load_sweep

RUNS = Path("results") / "runs"
DEVICES = ("cpu", "cuda")


class UsageError(Exception):
    """Something asked for that cannot be: what, which value, the rule, the remedy, in one line."""


@dataclass(frozen=True)
class RunPlan:
    """What a run is asked to do: the jobs of each round, and the file they come from."""

    sweep: SweepSpec
    sweep_file: Path
    rounds: tuple[Plan, ...]
    time_budget_s: float | None = None

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs of one round, in the sweep's order unless there are several rounds."""
        return self.rounds[0].jobs

    @property
    def num_jobs(self) -> int:
        return sum(len(plan.jobs) for plan in self.rounds)

    @property
    def folder(self) -> Path:
        return self.rounds[0].folder

    @property
    def run_id(self) -> str:
        return self.rounds[0].run_id


def plan(
    sweep: str,
    *,
    out: Path | None,
    backends: Sequence[str],
    filters: Sequence[str],
    case_ids: Sequence[str],
    device: str | None,
    rounds: int = 1,
    time_budget_min: float | None,
) -> RunPlan:
    """Everything that can be known to be wrong is said here, before anything runs. Raises SweepError, UsageError."""
    check_device(device)
    sweep_file = find_sweep(sweep)
    jobs = select(sweep, backends, filters, case_ids)
    spec = load_sweep(sweep_file)
    run_id = new_run_id(spec.name)
    folder = out or RUNS / run_id
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--out {folder}: it exists and is not an empty folder; name a new one")
    budget_s = None if time_budget_min is None else time_budget_min * 60
    plans = [Plan(jobs, spec.policy, folder, run_id, device)]
    if rounds > 1:
        plans = [replace(plans[0], jobs=shuffled(jobs, run_id, number), round=number) for number in range(rounds)]
    return RunPlan(spec, sweep_file, tuple(plans), budget_s)


def check_device(device: str | None) -> None:
    """Raises UsageError for what cannot name a device; whether it is there, only torch knows."""
    if device is None:
        return
    kind, colon, index = device.partition(":")
    if kind not in DEVICES or (colon and not (kind == "cuda" and index.isdecimal())):
        raise UsageError(f"--device {device}: it must be cpu, cuda or cuda:N")


def measure(run_plan: RunPlan, on_record: Callable[[Record], None]) -> Outcome:
    """Run the plan into its folder. A run that is refused leaves none: the command, set right, may name it again."""
    begin(run_plan)
    try:
        return execute(*run_plan.rounds, on_record=on_record, time_budget_s=run_plan.time_budget_s)
    except Refused:
        if not (run_plan.folder / JOURNAL_NAME).exists():
            shutil.rmtree(run_plan.folder)
        raise


def begin(run_plan: RunPlan) -> None:
    """Make the folder, with the sweep and what was asked for beside the results to come."""
    run_plan.folder.mkdir(parents=True, exist_ok=True)
    asked = {
        "run_id": run_plan.run_id,
        "moebench": __version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["moebench", *sys.argv[1:]]),
        "sweep": run_plan.sweep.name,
        "num_jobs": len(run_plan.jobs),
        "num_rounds": len(run_plan.rounds),
    }
    write_atomically(run_plan.folder / "run.json", (json.dumps(asked, indent=2) + "\n").encode())
    write_atomically(run_plan.folder / "sweep.toml", run_plan.sweep_file.read_bytes())


def finish(folder: Path) -> list[Path]:
    """Parquet, CSV, plots and report from the journal. What was measured before an interruption counts too."""
    if not (folder / JOURNAL_NAME).exists():
        return []
    frame = load(folder)
    plots = write_plots(all_figures(frame), folder / "plots")
    svgs = {path.stem: path.read_bytes() for path in plots if path.suffix == ".svg"}
    return [*write(frame, folder), *plots, _write_page(page(frame, svgs, folder), folder / REPORT_NAME)]


def draw(path: Path) -> list[Path]:
    """Draw the plots of a results folder, or of a Parquet file beside it."""
    return write_plots(all_figures(load(path)), _folder_of(path) / "plots")


def report(path: Path, out: Path | None) -> Path:
    """Write the report of a results folder or of a Parquet file, by default beside it."""
    frame = load(path)
    out = out or _folder_of(path) / REPORT_NAME
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}; make it, or name a file elsewhere")
    svgs = {name: image(figure, "svg") for name, figure in all_figures(frame)}
    return _write_page(page(frame, svgs, _folder_of(path)), out)


def _write_page(html: str, out: Path) -> Path:
    write_atomically(out, html.encode())
    return out


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent
