"""Define the command `moebench ab`, which parses, runs moebench.verdicts.ab and prints."""

from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.console import err, job_progress
from moebench.cli.gate import Github, Junit, Threshold, check_outputs, report, share
from moebench.cli.options import (
    AsJson,
    Backends,
    CaseIds,
    Device,
    Filters,
    Gpus,
    Only,
    Out,
    ShareGpus,
    Sweep,
    TimeBudget,
)
from moebench.errors import UsageError
from moebench.results.stats import THRESHOLD
from moebench.run import request
from moebench.run.runfile import Asked

if TYPE_CHECKING:
    from moebench.verdicts.ab import AbPlan
    from moebench.verdicts.gate import GateResult

commands = typer.Typer()


@commands.command("ab")
def ab_(
    a: Annotated[
        str, typer.Argument(metavar="REV_A", help="git revision, or folder that contains the package `experts`")
    ],
    b: Annotated[str, typer.Argument(metavar="REV_B", help="git revision or folder to judge against REV_A")],
    sweep: Sweep,
    out_dir: Out = None,
    backend: Backends = None,
    only: Only = None,
    device: Device = None,
    gpus: Gpus = None,
    share_gpus: ShareGpus = False,
    filters: Filters = None,
    case: CaseIds = None,
    threshold: Threshold = f"{THRESHOLD:.0%}",
    time_budget: TimeBudget = None,
    junit_file: Junit = None,
    for_github: Github = False,
    as_json: AsJson = False,
) -> None:
    """Measure two revisions in turn and judge the second.

    Is B slower than A, does it use more memory, or is it wrong? Exit code 0: no. 1: yes, or a job is missing. 2: bad
    usage. 3: not decided.
    """
    from moebench.verdicts import ab  # imports pandas and scipy, which --help does not need

    if not (a and b):
        raise UsageError(
            "REV_A and REV_B: each must be a git revision, or a folder with the package experts; one is empty"
        )
    smallest = share("--threshold", threshold)
    check_outputs(for_github, as_json)
    asked = Asked(
        backends=tuple(backend or ()),
        only=tuple(only or ()),
        filters=tuple(filters or ()),
        case_ids=tuple(case or ()),
        device=device,
    )
    run = request.plan(sweep, asked, out=out_dir, time_budget_min=time_budget, other_experts=True)
    run, notes = request.on_gpus(run, gpus, share_gpus)
    for note in notes:
        err.print(note)
    with request.in_own_folder(run) as run, ab.prepared(run, a, b, smallest) as plan:
        err.print(f"A {plan.a}, B {plan.b}: {len(plan.common)} jobs, {' or '.join(map(str, plan.looks))} rounds")
        result = _measure(plan)
    err.print(f"results: {' and '.join(map(str, plan.folders))}")
    report(result, junit_file, for_github, as_json)


def _measure(plan: "AbPlan") -> "GateResult":
    """Return the verdicts of the last look. Print a line of totals after each look."""
    from moebench.report.gatewords import total
    from moebench.verdicts import ab

    with job_progress() as progress:
        for look in ab.compare_revisions(plan, progress.done):
            spent = f", time budget spent: {look.num_left} measurements left" if look.num_left else ""
            progress.print(f"after {look.num_rounds} rounds: {total(look.result)}{spent}")
            result = look.result
    return result
