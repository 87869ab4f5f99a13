"""Define the command `moebench parity`, which searches for cases on which a backend is wrong."""

import json
from typing import Annotated

import typer

from moebench.cli import listing
from moebench.cli.console import job_progress, out
from moebench.cli.options import AsJson, Device
from moebench.errors import EXIT_FAILED, EXIT_INTERRUPTED, UsageError
from moebench.parity.checks import CHECKS
from moebench.parity.space.rules import limits
from moebench.parity.space.trial import Trial
from moebench.run.audit import Audit, Level, Request, audit, audit_case

commands = typer.Typer()


@commands.command()
def parity(
    backends: Annotated[
        list[str] | None,
        typer.Argument(metavar="[BACKEND]...", help="default: all that can run on this device, except peers"),
    ] = None,
    level: Annotated[
        Level, typer.Option(help="quick: the covering cases; standard: then a search, in all two minutes a backend")
    ] = "standard",
    seconds: Annotated[
        float | None, typer.Option(min=0, help="seconds of the search for each backend; default: what is left")
    ] = None,
    checks: Annotated[
        list[str] | None, typer.Option("--check", help="try only this part of the space; repeatable")
    ] = None,
    dtypes: Annotated[
        list[str] | None, typer.Option("--dtype", help="use only this dtype; repeatable; default: all dtypes")
    ] = None,
    case: Annotated[
        str | None, typer.Option(help="try only this case, as a counterexample prints it: 'NAME=VALUE …'")
    ] = None,
    dispatcher: Annotated[str | None, typer.Option(help="dispatcher of a --case with ep_size above 1")] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(min=0, max=2**20, help="seed of the cases and their values")] = 0,
    list_checks: Annotated[bool, typer.Option("--list", help="print what each check looks for; run nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Search for a case on which a backend is wrong, and print the smallest one.

    First come the covering cases, which have all pairs of shapes, dtypes, layouts and call patterns. Then a search goes
    on at random. Exit code 1: a case failed, or no case of a named BACKEND could run. Peers are layers of other
    libraries; name one to check it.
    """
    if list_checks:
        _print_checks(as_json)
        return
    request = Request(level, seconds, tuple(checks or ()), tuple(dtypes or ()), device, seed)
    if case is None and dispatcher is not None:
        raise UsageError(f"--dispatcher {dispatcher} without --case: only a case has a dispatcher of its own")
    if case is not None and (checks or dtypes or seconds is not None):
        raise UsageError("--check, --dtype and --seconds choose what to try: leave them out with --case")
    if case is not None:
        found = _one_case(backends or [], case, dispatcher, device)
    else:
        found = _all_cases(backends or [], request)
    if as_json:
        out.print_json(json.dumps(found.as_dict()))
    else:
        from moebench.report.tables.audittable import AuditTable  # imports pandas

        out.print(AuditTable(found), soft_wrap=True)  # a counterexample is copied, so that no line may be wrapped
    if found.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not found.passed:
        raise typer.Exit(EXIT_FAILED)


def _one_case(backends: list[str], case: str, dispatcher: str | None, device: str | None) -> Audit:
    if len(backends) != 1:
        raise UsageError(f"--case needs one BACKEND, and {len(backends)} are named")
    return audit_case(backends[0], Trial.parse(case), dispatcher, device)


def _all_cases(backends: list[str], request: Request) -> Audit:
    request.check()
    with job_progress() as progress:
        named = backends or listing.available_backends(request.device)
        return audit(
            named,
            request,
            required=backends,
            on_plan=lambda backend, total: progress.plan(total, backend),
            on_record=progress.done,
        )


def _print_checks(as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps({check.name: check.looks_for for check in CHECKS.values()}))
    else:
        out.print(listing.checks())
        out.print("What fits together in a case:")
        out.print("\n".join(f"* {limit}" for limit in limits()), soft_wrap=True)
