"""The command line: parses, calls one function, prints. Imported by nothing.

Exit codes: 0 all right (unsupported and out of memory are results), 1 a mismatch, timeout, crash or error, 2 bad usage,
130 interrupted.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from moebench import __version__, abcli, advisecli, comparecli, gatecli, listing, results, runcli, runplan
from moebench.audit import audit
from moebench.console import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, err, out, progress_bar
from moebench.doctor import doctor as examine
from moebench.frame import ResultsError, load, to_json
from moebench.options import AsJson, Backends, Device, Filters
from moebench.plan import Refused, RunnerError, UsageError
from moebench.record import Record
from moebench.revisions import RevisionError
from moebench.selection import select
from moebench.spec import SweepError
from moebench.suite import CHECKS
from moebench.tables import summary

app = typer.Typer(
    name="moebench",
    help="Measure, check and compare the expert layers of Mixture-of-Experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(help="a results folder, or a Parquet file of one")]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"moebench {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    pass


app.command()(runcli.run)


@app.command()
def parity(
    backends: Annotated[
        list[str] | None, typer.Argument(metavar="[BACKEND]...", help="default: all but peers that run on this device")
    ] = None,
    checks: Annotated[
        list[str] | None, typer.Option("--check", help="only this check; repeatable; default all")
    ] = None,
    dtypes: Annotated[
        list[str] | None, typer.Option("--dtype", help="only this dtype; repeatable; default all")
    ] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(min=0, max=2**30, help="of weights, tokens and routing")] = 0,
    list_checks: Annotated[bool, typer.Option("--list", help="print the checks, run none")] = False,
    as_json: AsJson = False,
) -> None:
    """Look for faults that shipped elsewhere, on small shapes.

    Exit code 1 where one is found, or where no case of a backend that was named could run.
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
        out.print(found)
    if found.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not found.passed:
        raise typer.Exit(EXIT_FAILED)


def _print_checks(as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps({check.name: check.looks_for for check in CHECKS.values()}))
    else:
        out.print(listing.checks())


@app.command("list")
def list_(
    sweep: Annotated[str | None, typer.Argument(help="list this sweep's cases; without it sweeps and backends")] = None,
    backend: Backends = None,
    filters: Filters = None,
    device: Annotated[str | None, typer.Option(help="the device that backends are asked about")] = None,
    as_json: AsJson = False,
) -> None:
    """Sweeps and backends, with why one is unavailable here; or a sweep's jobs, and what they may take."""
    if sweep is not None and device is not None:
        raise UsageError(f"--device {device} beside SWEEP: its jobs are the same on every device; leave it out")
    if sweep is None and (backend or filters):
        raise UsageError("--backend and --filter select jobs of a sweep: give a SWEEP beside them")
    if sweep is not None:
        runcli.print_plan(select(sweep, backend or [], filters or [], []), as_json)
        return
    runplan.check_device(device)
    listed = listing.everything(device)
    if as_json:
        out.print_json(json.dumps(listed.as_dict()))
    else:
        out.print(listed)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """The machine, versions, what is missing and how to install it."""
    findings = examine()
    if as_json:
        out.print_json(json.dumps([vars(finding) for finding in findings]))
        return
    for finding in findings:
        out.print(str(finding), soft_wrap=True)
    out.print(listing.backends(None), soft_wrap=True)


@app.command()
def show(folder: Folder, as_json: AsJson = False) -> None:
    """The table of a results folder again."""
    frame = load(folder)
    if as_json:
        out.print_json(to_json(frame))
    else:
        out.print(summary(frame))


@app.command()
def plots(folder: Folder) -> None:
    """Draw the plots of a results folder again."""
    for path in results.draw(folder):
        out.print(f"wrote {path}", soft_wrap=True)


@app.command()
def report(
    folder: Folder,
    out_file: Annotated[Path | None, typer.Option("--out", help="the page; default report.html beside them")] = None,
    gate: Annotated[Path | None, typer.Option(help="a file of what `moebench gate --json` printed")] = None,
) -> None:
    """One HTML page of a results folder: verdict, plots, table with filters, commands to reproduce."""
    out.print(f"wrote {results.report(folder, out_file, gate)}", soft_wrap=True)


app.add_typer(gatecli.commands)
app.add_typer(abcli.commands)
app.add_typer(comparecli.commands)
app.add_typer(advisecli.commands)


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    try:
        app()
    except (SweepError, ResultsError, RevisionError, Refused, UsageError) as mistake:
        err.print(str(mistake))
        raise SystemExit(EXIT_USAGE) from None
    except RunnerError as failure:
        err.print(str(failure))
        raise SystemExit(EXIT_FAILED) from None


if __name__ == "__main__":
    main()
