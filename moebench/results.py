"""A results folder from its plan to its tables and plots. No torch here."""

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from moebench import __version__
from moebench.case import Job
from moebench.environment import Environment
from moebench.frame import JOURNAL_NAME, load, write, write_atomically
from moebench.pagegate import read_gate
from moebench.plan import UsageError as UsageError
from moebench.plots import all_figures, image, write_plots
from moebench.record import Journal, Record
from moebench.report import REPORT_NAME, page
from moebench.resume import LOCK_NAME, SWEEP_NAME, Asked, RunFile, digest, digest_jobs, environment_changes, locked
from moebench.rounds import shuffled
from moebench.runner import Outcome, Plan, Refused, execute, new_run_id, writing_to
from moebench.selection import select, select_of
from moebench.slots import NoGpu, choose
from moebench.spec import SweepSpec, find_sweep, load_sweep, parse_sweep

RUNS = Path("results") / "runs"
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class RunPlan:
    """What a run is asked to do: the jobs of each round that are left, and what its folder says of it.

    `earlier` are the records that the folder has already, of a run that is resumed.
    """

    run: RunFile
    sweep_text: bytes
    rounds: tuple[Plan, ...]
    time_budget_s: float | None = None
    earlier: tuple[Record, ...] = ()
    is_resumed: bool = False
    force: bool = False

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
    profile: bool = False,
    time_budget_min: float | None,
) -> RunPlan:
    """Everything that can be known to be wrong is said here, before anything runs. Raises SweepError, UsageError."""
    check_device(device)
    sweep_file = find_sweep(sweep)
    spec, jobs = load_sweep(sweep_file), select(sweep, backends, filters, case_ids)
    check_named(jobs, backends)
    run_id = new_run_id(spec.name)
    folder = out or RUNS / run_id
    _check_new(folder)
    text = sweep_file.read_bytes()
    run = RunFile(
        run_id=run_id,
        moebench=__version__,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(),
        sweep=spec.name,
        sweep_file=str(sweep_file),
        sweep_sha256=digest(text),
        jobs_sha256=digest_jobs(jobs),
        num_jobs=len(jobs),
        num_rounds=rounds,
        asked=Asked(
            backends=tuple(backends),
            filters=tuple(filters),
            case_ids=tuple(case_ids),
            device=device,
            rounds=rounds,
            profile=profile,
        ),
    )
    return RunPlan(run, text, _rounds(run, jobs, spec, folder), _seconds(time_budget_min))


def plan_rest(folder: Path, *, backends: Sequence[str], time_budget_min: float | None, force: bool = False) -> RunPlan:
    """What is left of the run in the folder. `backends` are the modules that it may import, as its own command named.

    Raises UsageError where it is none, and where sweep or jobs are no longer those of then, unless by force.
    """
    run = RunFile.read(folder)
    asked = run.asked
    text = (folder / SWEEP_NAME).read_bytes()
    spec = parse_sweep(text.decode(), run.sweep_file)
    jobs = select_of(spec, run.sweep, asked.backends, asked.filters, asked.case_ids)
    changes = run.changes(folder, jobs)
    if changes and not force:
        raise UsageError(
            f"--resume {folder}: {'; '.join(changes)}; --force goes on with {folder / SWEEP_NAME} as it is"
        )
    check_named(jobs, backends)
    earlier = tuple(Journal(folder / JOURNAL_NAME))
    done = {(row.key, row.round) for row in earlier}
    plans = (
        replace(whole, jobs=tuple(job for job in whole.jobs if (job.key, whole.round) not in done))
        for whole in _rounds(run, jobs, spec, folder)
    )
    resumed = (*run.resumed, f"{datetime.now(UTC).isoformat(timespec='seconds')} {_command()}")
    run = run.model_copy(update={"resumed": resumed})
    return RunPlan(run, text, tuple(plans), _seconds(time_budget_min), earlier, is_resumed=True, force=force)


def _rounds(run: RunFile, jobs: tuple[Job, ...], spec: SweepSpec, folder: Path) -> tuple[Plan, ...]:
    """The plan of each round. One has the sweep's order, several each an order of its own."""
    whole = Plan(jobs, spec.policy, folder, run.run_id, run.asked.device, profile=run.asked.profile)
    if run.asked.rounds == 1:
        return (whole,)
    numbers = range(run.asked.rounds)
    return tuple(replace(whole, jobs=shuffled(jobs, run.run_id, number), round=number) for number in numbers)


def _command() -> str:
    return shlex.join(["moebench", *sys.argv[1:]])


def _seconds(minutes: float | None) -> float | None:
    return None if minutes is None else minutes * 60


def _check_new(folder: Path) -> None:
    if folder.exists() and (
        not folder.is_dir() or any(path.name != LOCK_NAME.parent.name for path in folder.iterdir())
    ):
        raise UsageError(f"--out {folder}: it exists and is not an empty folder; name a new one")


def check_device(device: str | None) -> None:
    """Raises UsageError for what cannot name a device; whether it is there, only torch knows."""
    if device is None:
        return
    kind, colon, index = device.partition(":")
    if kind not in DEVICES or (colon and not (kind == "cuda" and index.isdecimal())):
        raise UsageError(f"--device {device}: it must be cpu, cuda or cuda:N")


def check_named(jobs: Sequence[Job], backends: Sequence[str]) -> None:
    """Raises UsageError for a module that a file names and the command line does not: to import it is to run it."""
    names = list(dict.fromkeys(job.backend for job in jobs))
    unnamed = [name for name in names if ":" in name and name not in backends]
    if unnamed:
        options = " ".join(f"--backend {name}" for name in names)
        raise UsageError(
            f"backend {', '.join(unnamed)}: a module is imported only where the command line names it, not for being "
            f"in a file; if you trust it, add {options}"
        )


def on_gpus(run_plan: RunPlan, wanted: str | None, share: bool) -> tuple[RunPlan, list[str]]:
    """The plan on the GPUs that are wanted and free, and what is to be said of others. Raises UsageError."""
    device = run_plan.run.asked.device
    try:
        slots, notes = choose(device, wanted, share)
    except NoGpu as refusal:
        raise UsageError(str(refusal)) from refusal
    if slots[0].gpu is not None and device is not None:
        device = "cuda"  # each worker sees its own alone
    rounds = tuple(replace(one, slots=slots, device=device) for one in run_plan.rounds)
    return replace(run_plan, rounds=rounds), notes


def measure(run_plan: RunPlan, on_record: Callable[[Record], None]) -> Outcome:
    """Run the plan into its folder. A run that is refused leaves none: the command, set right, may name it again.

    The outcome has earlier records too. Raises UsageError where another process writes into the folder.
    """
    folder = run_plan.folder
    with writing_to(folder), locked(folder):
        if not run_plan.is_resumed:
            _check_new(folder)  # again: another run may have come and gone
        run_plan.run.write(folder)
        write_atomically(folder / SWEEP_NAME, run_plan.sweep_text)

        def check(environment: Environment) -> None:
            changes = environment_changes(folder, environment) if run_plan.is_resumed and not run_plan.force else []
            if changes:
                raise Refused(
                    f"--resume {folder}: not where it was: {'; '.join(changes)}; --force goes on all the same"
                )

        try:
            outcome = execute(
                *run_plan.rounds, on_record=on_record, on_environment=check, time_budget_s=run_plan.time_budget_s
            )
        except Refused:
            if not (run_plan.is_resumed or (folder / JOURNAL_NAME).exists()):
                shutil.rmtree(folder)
            raise
    return replace(outcome, records=(*run_plan.earlier, *outcome.records))


def finish(folder: Path) -> list[Path]:
    """Parquet, CSV, plots and report from the journal. What was measured before an interruption counts too."""
    if not (folder / JOURNAL_NAME).exists():
        return []
    frame = load(folder)
    with writing_to(folder):
        plots = write_plots(all_figures(frame), folder / "plots")
        svgs = {path.stem: path.read_bytes() for path in plots if path.suffix == ".svg"}
        written = [*write(frame, folder), *plots, _write_page(page(frame, svgs, folder), folder / REPORT_NAME)]
    return [*written, *sorted((folder / "traces").glob("*.json"))]


def draw(path: Path) -> list[Path]:
    """Draw the plots of a results folder, or of a Parquet file beside it."""
    return write_plots(all_figures(load(path)), _folder_of(path) / "plots")


def report(path: Path, out: Path | None, gate: Path | None) -> Path:
    """Write the report of a results folder or of a Parquet file, by default beside it, with the verdicts in `gate`."""
    frame, verdicts = load(path), None if gate is None else read_gate(gate)
    out = out or _folder_of(path) / REPORT_NAME
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}; make it, or name a file elsewhere")
    svgs = {name: image(figure, "svg") for name, figure in all_figures(frame)}
    return _write_page(page(frame, svgs, _folder_of(path), verdicts), out)


def _write_page(html: str, out: Path) -> Path:
    write_atomically(out, html.encode())
    return out


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent
