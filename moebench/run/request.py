"""Plan the run that the user asks for, and report the mistakes that can be found before anything runs."""

import itertools
import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from moebench import __version__
from moebench.errors import UsageError
from moebench.machine.gpus import choose
from moebench.results.files import PARQUET_NAME, writable
from moebench.results.journal import JOURNAL_NAME, Journal
from moebench.results.record import SCHEMA, Record
from moebench.run.lock import check_new
from moebench.run.plan import Plan, new_run_id, shuffled
from moebench.run.runfile import SWEEP_NAME, Asked, RunFile, digest, digest_jobs
from moebench.run.workers.ray import check_ray
from moebench.run.workers.slurm import slurm_nodes
from moebench.workload.axes import cut
from moebench.workload.backends import check_known
from moebench.workload.case import Job
from moebench.workload.models import EXPERTS, Model
from moebench.workload.selection import select_of
from moebench.workload.spec import SweepSpec, find_sweep, parse_sweep, read_sweep

RUNS = Path("results") / "runs"
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class RunPlan:
    """What a run has to do: the jobs that each round has left, and what the folder records about the run.

    `earlier` has the records that are already in the folder of a run that is resumed. `notes` say what the cases leave
    out of the models that they come from. `ray` is the address of the Ray cluster that runs the workers. If `slurm` is
    true, the nodes of this Slurm job run them. Otherwise this machine does.
    """

    run: RunFile
    sweep_text: bytes
    rounds: tuple[Plan, ...]
    time_budget_s: float | None = None
    earlier: tuple[Record, ...] = ()
    is_resumed: bool = False
    force: bool = False
    notes: tuple[str, ...] = ()
    ray: str | None = None
    slurm: bool = False

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that any round has left, each once. With one round they are in the sweep's order."""
        return tuple(dict.fromkeys(job for plan in self.rounds for job in plan.jobs))

    @property
    def num_jobs(self) -> int:
        """The number of measurements that are left in all rounds together."""
        return sum(len(plan.jobs) for plan in self.rounds)

    @property
    def folder(self) -> Path:
        return self.rounds[0].folder

    @property
    def run_id(self) -> str:
        return self.rounds[0].run_id


def plan(
    sweep: str,
    asked: Asked,
    *,
    out: Path | None = None,
    time_budget_min: float | None = None,
    other_experts: bool = False,
) -> RunPlan:
    """Plan a new run into the folder `out` (default: a new folder in RUNS).

    With `other_experts`, workers import other packages `experts`, which may have other backends than this one.

    Raises SweepError for a wrong sweep, selection of jobs or name of a backend. Raises UsageError for a wrong device,
    for a module that the command line does not name, and for a folder that is not empty.
    """
    sweep_file = find_sweep(sweep)
    text = read_sweep(sweep_file)
    planned = plan_text(text, str(sweep_file), sweep, asked, out=out, time_budget_min=time_budget_min)
    if not other_experts:
        check_known(planned.jobs)
    return planned


def plan_text(
    text: str, origin: str, sweep: str, asked: Asked, *, out: Path | None = None, time_budget_min: float | None = None
) -> RunPlan:
    """Plan a new run of the sweep in `text`, as `plan` does. Messages name `origin` and `sweep`."""
    check_device(asked.device)
    spec = _as_asked(parse_sweep(text, origin), asked)
    jobs = select_of(spec, sweep, asked.backends, asked.filters, asked.case_ids, asked.only)
    check_named(jobs, [*asked.backends, *asked.only])
    run_id = new_run_id(spec.name)
    folder = out or RUNS / run_id
    if out is not None:
        check_new(out)
    run = RunFile(
        run_id=run_id,
        moebench=__version__,
        started=_now(),
        command=_command(),
        sweep=spec.name,
        sweep_file=origin,
        sweep_sha256=digest(text.encode()),
        jobs_sha256=digest_jobs(jobs),
        num_jobs=len(jobs),
        num_rounds=asked.rounds,
        asked=asked,
    )
    rounds, notes = _rounds(run, jobs, spec, folder), _notes(spec, jobs, asked)
    return RunPlan(run, text.encode(), rounds, _seconds(time_budget_min), notes=notes)


def plan_rest(folder: Path, *, backends: Sequence[str], time_budget_min: float | None, force: bool = False) -> RunPlan:
    """Plan what is left of the run in the folder.

    `backends` are the names in this command's --backend and --only options; only a module among them may be imported.
    Raises UsageError, SweepError or ResultsError where the folder is not the folder of a run. Raises UsageError where
    the sweep or its jobs have changed since the run began, or where its rows have another schema, unless `force` is
    true.
    """
    run = RunFile.read(folder)
    asked = run.asked
    text = read_sweep(folder / SWEEP_NAME)
    spec = _as_asked(parse_sweep(text, run.sweep_file), asked)
    jobs = select_of(spec, run.sweep, asked.backends, asked.filters, asked.case_ids, asked.only)
    earlier = _earlier(folder)
    others = sorted({row.schema_version for row in earlier} - {SCHEMA})
    changes = run.changes(folder, jobs)
    changes += [f"its rows have schema {', '.join(map(str, others))}, this moebench measures {SCHEMA}"] * bool(others)
    if changes and not force:
        raise UsageError(
            f"--resume {folder}: {'; '.join(changes)}; --force resumes with {folder / SWEEP_NAME} as it is"
        )
    check_known(jobs)
    check_named(jobs, backends)
    done = {(row.key, row.round) for row in earlier}
    plans = (
        replace(whole, jobs=tuple(job for job in whole.jobs if (job.key, whole.round) not in done))
        for whole in _rounds(run, jobs, spec, folder)
    )
    run = run.model_copy(update={"resumed": (*run.resumed, f"{_now()} {_command()}")})
    return RunPlan(run, text.encode(), tuple(plans), _seconds(time_budget_min), earlier, is_resumed=True, force=force)


@contextmanager
def in_own_folder(run_plan: RunPlan) -> Iterator[RunPlan]:
    """Make the folder of a new run in RUNS, and yield the plan. At the end, remove the folder if it is still empty.

    Two runs that begin in the same second would have the same name. The run that comes second gets a name with a
    number. A run that is resumed, and a run whose folder the user named, stay as they are.
    """
    if run_plan.is_resumed or run_plan.folder != RUNS / run_plan.run_id:
        yield run_plan
        return
    for number in itertools.count(1):
        run_id = run_plan.run_id if number == 1 else f"{run_plan.run_id}-{number}"
        folder = RUNS / run_id
        with writable(folder), suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    rounds = tuple(replace(one, run_id=run_id, folder=folder) for one in run_plan.rounds)
    try:
        yield replace(run_plan, run=run_plan.run.model_copy(update={"run_id": run_id}), rounds=rounds)
    finally:
        with suppress(OSError):  # it is not empty, or a refused run has removed it
            folder.rmdir()


def _earlier(folder: Path) -> tuple[Record, ...]:
    journal = folder / JOURNAL_NAME
    if not journal.exists() and (folder / PARQUET_NAME).exists():
        raise UsageError(
            f"--resume {folder}: the folder has {PARQUET_NAME} but not {JOURNAL_NAME}, which says what was measured; "
            "put it back, or run the sweep again into another folder"
        )
    return tuple(Journal(journal))


def _rounds(run: RunFile, jobs: tuple[Job, ...], spec: SweepSpec, folder: Path) -> tuple[Plan, ...]:
    """Return the plan of each round. A single round has the sweep's order; several rounds each have their own order."""
    whole = Plan(jobs, spec.policy, folder, run.run_id, run.asked.device, profile=run.asked.profile)
    if run.asked.rounds == 1:
        return (whole,)
    numbers = range(run.asked.rounds)
    return tuple(replace(whole, jobs=shuffled(jobs, run.run_id, number), round=number) for number in numbers)


def _as_asked(spec: SweepSpec, asked: Asked) -> SweepSpec:
    spec = spec if asked.model is None else spec.with_model(asked.model)
    return spec if asked.subject is None else spec.with_subject(asked.subject)


def _notes(spec: SweepSpec, jobs: Sequence[Job], asked: Asked) -> tuple[str, ...]:
    measured = {job.case.model for job in jobs}
    notes = [f"{model}: {note}" for model in spec.models if model.name in measured for note in model.notes]
    if asked.model is not None:
        unfit = [
            size for exclude in spec.excludes for size in exclude.get("ep_size", ()) if _is_unfit(size, asked.model)
        ]
        notes += [f"{asked.model}: EP size {size} is left out: it does not divide the experts" for size in unfit]
    if asked.subject not in (None, EXPERTS):
        routings = {str(one): None for axes in spec.grids for one in axes.get("routing", ()) if one != "uniform"}
        notes += [f"{asked.subject}: routing {one} is left out: a block routes its tokens itself" for one in routings]
    return tuple(notes)


def _is_unfit(ep_size: object, model: Model) -> bool:
    return isinstance(ep_size, int) and model.fields["n_routed_experts"] % ep_size != 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _command() -> str:
    return shlex.join(["moebench", *sys.argv[1:]])


def _seconds(minutes: float | None) -> float | None:
    if minutes is not None and math.isnan(minutes):
        raise UsageError("--time-budget nan: it must be a number of minutes, 0 or more")
    return None if minutes is None else minutes * 60


def check_device(device: str | None) -> None:
    """Raise UsageError for text that does not name a device. Only torch knows whether the device exists."""
    if device is None:
        return
    kind, colon, index = device.partition(":")
    if kind not in DEVICES or (colon and not (kind == "cuda" and re.fullmatch("[0-9]{1,9}", index))):
        raise UsageError(f"--device {cut(device)}: it must be cpu, cuda or cuda:N")


def check_named(jobs: Sequence[Job], backends: Sequence[str]) -> None:
    """Raise UsageError for a module that a file names but the command line does not.

    Importing a module runs its code, so the user must name it.
    """
    names = list(dict.fromkeys(job.backend for job in jobs))
    unnamed = [name for name in names if ":" in name and name not in backends]
    if unnamed:
        options = " ".join(f"--backend {name}" for name in unnamed)
        raise UsageError(
            f"backend {', '.join(unnamed)}: a module is imported only where the command line names it; "
            f"if you trust it, add {options}"
        )


def on_gpus(run_plan: RunPlan, wanted: str | None, share: bool) -> tuple[RunPlan, list[str]]:
    """Return the plan with slots on the GPUs that are wanted and free, and a note on each GPU that is in use.

    Raises UsageError as moebench.machine.gpus.choose does.
    """
    device = run_plan.run.asked.device
    slots, notes = choose(device, wanted, share)
    if slots[0].gpu is not None and device is not None:
        device = "cuda"  # each worker sees only its own GPUs
    rounds = tuple(replace(one, slots=slots, device=device) for one in run_plan.rounds)
    return replace(run_plan, rounds=rounds), notes


def on_cluster(run_plan: RunPlan, ray: str | None, slurm: bool, wanted: str | None, share: bool) -> RunPlan:
    """Return the plan with its workers on a Ray cluster, or on the nodes of this Slurm job.

    Raises UsageError where Ray is not installed, where the address is not one, where other options choose GPUs, and as
    moebench.run.workers.slurm.slurm_nodes does.
    """
    cluster = "--slurm" if ray is None else "--ray"
    if ray is not None and slurm:
        raise UsageError("--ray and --slurm: both choose where to run; leave one of the two out")
    if ray is not None:
        check_ray()
        if not re.fullmatch(r"auto|[^/\s]+:[0-9]{1,5}", ray):
            raise UsageError(f"--ray {cut(ray)}: it must be HOST:PORT of the cluster's head, or auto")
    device = run_plan.run.asked.device
    _, _, index = (device or "").partition(":")
    others = {f"--gpus {wanted}": wanted is not None, "--share-gpus": share, f"--device cuda:{index}": bool(index)}
    for option in [option for option, is_given in others.items() if is_given]:
        remedy = f"leave {option.split()[0]} out"
        raise UsageError(f"{option} with {cluster}: the cluster chooses the GPUs; {remedy}")
    if slurm:
        slurm_nodes(device)  # raises outside of a job
    return replace(run_plan, ray=ray, slurm=slurm)
