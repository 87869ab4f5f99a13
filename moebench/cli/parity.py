"""Define the command `moebench parity`, which checks backends for known faults."""

import json
from typing import Annotated

import typer

from moebench.cli import listing
from moebench.cli.console import out, progress_bar
from moebench.cli.options import AsJson, Device
from moebench.errors import EXIT_FAILED, EXIT_INTERRUPTED
from moebench.parity.checks import CHECKS
from moebench.report.tables.audittable import AuditTable
from moebench.results.record import Record
from moebench.run.audit import audit

commands = typer.Typer()


@commands.command()
def parity(
    backends: Annotated[
        list[str] | None,
        typer.Argument(metavar="[BACKEND]...", help="default: all that can run on this device, except peers"),
    ] = None,
    checks: Annotated[
        list[str] | None, typer.Option("--check", help="run only this check; repeatable; default: all checks")
    ] = None,
    dtypes: Annotated[
        list[str] | None, typer.Option("--dtype", help="use only this dtype; repeatable; default: all dtypes")
    ] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(min=0, max=2**30, help="seed of the weights, tokens and routing")] = 0,
    list_checks: Annotated[bool, typer.Option("--list", help="print what each check looks for; run nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Check backends for known faults, on small shapes.

    Each check looks for a fault that some MoE library has shipped. Exit code 1: a check found a fault, or no case of a
    named BACKEND could run. Peers are layers of other libraries; name one to check it.
    """
    if list_checks:
        _print_checks(as_json)
        return
    with progress_bar() as progress:
        task = progress.add_task("", total=None)

        def show(row: Record) -> None:
            progress.update(task, advance=1, description=f"{row.backend} {row.check} {row.status.value}")

        found = audit(
            backends or listing.available_backends(device),
            checks=checks or [],
            dtypes=dtypes or [],
            device=device,
            seed=seed,
            required=backends or [],
            on_plan=lambda num_jobs: progress.update(task, total=num_jobs),
            on_record=show,
        )
    if as_json:
        out.print_json(json.dumps(found.as_dict()))
    else:
        out.print(AuditTable(found))
    if found.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not found.passed:
        raise typer.Exit(EXIT_FAILED)


def _print_checks(as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps({check.name: check.looks_for for check in CHECKS.values()}))
    else:
        out.print(listing.checks())
