"""Define the command `moebench run`, which measures a sweep and prints the results."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebench.cli.console import err, job_progress, out
from moebench.cli.options import (
    AsJson,
    Backends,
    CaseIds,
    Device,
    Filters,
    Gpus,
    ModelOption,
    Only,
    Out,
    Ray,
    ShareGpus,
    Slurm,
    SubjectOption,
    TimeBudget,
)
from moebench.errors import EXIT_FAILED, EXIT_INTERRUPTED, UsageError
from moebench.report.plots.settings import import_matplotlib
from moebench.results.record import GOOD
from moebench.run import request, start
from moebench.run.request import RunPlan
from moebench.run.runfile import MOST_ROUNDS, Asked
from moebench.run.runner import Outcome
from moebench.workload.case import Job
from moebench.workload.modelconfig import read_model

if TYPE_CHECKING:
    from moebench.report.folder import Written

commands = typer.Typer()


@commands.command()
def run(
    sweep: Annotated[str | None, typer.Argument(help="a sweep file, or the name of one in suites/")] = None,
    out_dir: Out = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="continue the run in this results folder, with its options")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="resume even if the sweep file or the environment changed")
    ] = False,
    backend: Backends = None,
    model: ModelOption = None,
    subject: SubjectOption = None,
    only: Only = None,
    device: Device = None,
    gpus: Gpus = None,
    share_gpus: ShareGpus = False,
    ray: Ray = None,
    slurm: Slurm = False,
    filters: Filters = None,
    case: CaseIds = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the jobs and estimates; measure nothing")] = False,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_ROUNDS,
            metavar="N",
            help="measure every job N times, in fresh processes and random order; default: 1",
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="write a trace of each job by torch's profiler")] = False,
    time_budget: TimeBudget = None,
    as_json: AsJson = False,
) -> None:
    """Measure a sweep: check every job and time it.

    Write the results as Parquet and CSV, plots, and a report. The last line names the results folder.
    """
    if resume is not None:
        _refuse_beside_resume(
            {"SWEEP": sweep, "--out": out_dir, "--device": device, "--filter": filters, "--case": case}
            | {"--rounds": rounds, "--profile": profile or None, "--model": model, "--subject": subject}
        )
        plan = request.plan_rest(
            resume, backends=[*(backend or []), *(only or [])], time_budget_min=time_budget, force=force
        )
    elif sweep is None:
        raise UsageError("moebench run: there is no sweep to measure; give a SWEEP, or --resume DIR")
    elif force:
        raise UsageError("--force without --resume: there is no run to resume; leave --force out, or give --resume DIR")
    else:
        asked = Asked(
            backends=tuple(backend or ()),
            only=tuple(only or ()),
            filters=tuple(filters or ()),
            case_ids=tuple(case or ()),
            device=device,
            rounds=rounds or 1,
            profile=profile,
            model=None if model is None else read_model(model),
            subject=subject,
        )
        plan = request.plan(sweep, asked, out=out_dir, time_budget_min=time_budget)
    for note in plan.notes:
        err.print(note, soft_wrap=True)
    if dry_run:
        print_plan(plan.jobs, as_json)
        return
    if ray is not None or slurm:
        plan = request.on_cluster(plan, ray, slurm, gpus, share_gpus)
    else:
        plan, notes = request.on_gpus(plan, gpus, share_gpus)
        for note in notes:
            err.print(note)
    with request.in_own_folder(plan) as plan:
        _measure(plan, as_json)


def _refuse_beside_resume(options: Mapping[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(
            f"{given[0]} with --resume: a resumed run keeps what it was started with; leave {given[0]} out"
        )


def _measure(plan: RunPlan, as_json: bool) -> None:
    """Measure, print the results and how the run ended, and exit."""
    from moebench.report.tables.tables import summary
    from moebench.results.frame import load

    with job_progress() as progress:
        progress.plan(plan.num_jobs)
        outcome = start.start_run(plan, progress.done)
        progress.doing("writing tables, plots and the report")
        written = _finish(plan.folder)
    if as_json:
        out.print_json(json.dumps(_report(outcome, plan.folder)))
    else:
        if outcome.records:
            out.print(summary(load(plan.folder)))
        if written.paths:
            out.print(written.sentence(plan.folder), soft_wrap=True)
        out.print(f"results: {plan.folder}", soft_wrap=True)
    for failure in written.failures:
        err.print(f"{failure}; draw it again with `moebench plots {shlex.quote(str(plan.folder))}`")
    _exit(outcome, plan.folder)


def _finish(folder: Path) -> "Written":
    import_matplotlib()
    from moebench.report.folder import finish

    try:
        return finish(folder)
    except KeyboardInterrupt:
        err.print(f"interrupted: everything measured so far is in the journal; {_go_on(folder)}")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _go_on(folder: Path) -> str:
    return f"go on with `moebench run --resume {shlex.quote(str(folder))}`"


def _report(outcome: Outcome, folder: Path) -> dict[str, Any]:
    from moebench.results.frame import load, to_json

    return {
        "results": str(folder),
        "interrupted": outcome.interrupted,
        "num_left": outcome.num_left,
        "statuses": dict(Counter(row.status.value for row in outcome.records)),
        "records": json.loads(to_json(load(folder))) if outcome.records else [],
    }


def _exit(outcome: Outcome, folder: Path) -> None:
    from moebench.results.folder import environments_beside

    for note in outcome.notes:
        err.print(note)
    for problem in {some.git_problem: None for some in environments_beside(folder).values() if some.git_problem}:
        err.print(f"the results do not name the revision of this checkout: {problem}")
    if outcome.interrupted:
        err.print(f"interrupted: {outcome.num_left} jobs left; {_go_on(folder)}")
        raise typer.Exit(EXIT_INTERRUPTED)
    if outcome.num_left:
        err.print(f"time budget spent: {outcome.num_left} jobs left; {_go_on(folder)}")
    if any(row.status not in GOOD for row in outcome.records):
        raise typer.Exit(EXIT_FAILED)


def print_plan(jobs: tuple[Job, ...], as_json: bool, ids: bool = False) -> None:
    """Print the jobs and estimates of their memory and time. With `ids`, each case has its case_id."""
    from moebench.report.tables.forecasttable import ForecastTable
    from moebench.report.tables.jobtable import JobTable
    from moebench.run.forecast import forecast, measured_jobs

    expected = forecast(jobs, measured_jobs())
    if as_json:
        listed = [
            {"case_id": job.case.case_id, **job.model_dump(mode="json"), "estimate": vars(estimate)}
            for job, estimate in zip(jobs, expected.estimates, strict=True)
        ]
        out.print_json(json.dumps({"jobs": listed, "forecast": expected.as_dict()}))
        return
    out.print(JobTable(jobs, ids))
    out.print(ForecastTable(expected), soft_wrap=True)
