"""Define the command `moebench`, which collects the subcommands of the other modules. No module imports this module.

The exit codes are:

    0    success; the statuses unsupported and oom also count as success
    1    a job ended as a mismatch, timeout, crash or error; gate or ab found a regression or a missing job
    2    bad usage
    3    gate or ab could not decide, or advise found no data
    130  interrupted
"""

import io
import json
from typing import Annotated, Any

import typer

from moebench import __version__
from moebench.cli import ab, advise, compare, gate, listing, parity, run, show
from moebench.cli.console import err, out
from moebench.cli.options import AsJson, Backends, Filters
from moebench.errors import EXIT_OK, MoebenchError, UsageError
from moebench.machine.doctor import doctor as examine
from moebench.run import request
from moebench.workload.selection import select

_TyperUsageError: Any = typer.BadParameter.__bases__[0]  # typer has no public name for it

app = typer.Typer(
    name="moebench",
    help="Measure, check and compare the expert layers of Mixture-of-Experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"moebench {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_(
    sweep: Annotated[
        str | None, typer.Argument(help="list the jobs of this sweep; default: list sweeps and backends")
    ] = None,
    backend: Backends = None,
    filters: Filters = None,
    device: Annotated[
        str | None, typer.Option(help="list what can run on this device; default: a GPU if there is one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List sweeps and backends, or the jobs of one sweep.

    The list says why a backend cannot run here. With SWEEP it has estimates of the jobs' memory and time.
    """
    if sweep is not None and device is not None:
        raise UsageError(f"--device {device} with SWEEP: a sweep has the same jobs on every device; leave --device out")
    if sweep is None and (backend or filters):
        raise UsageError("--backend and --filter select jobs of a sweep: give a SWEEP, or leave them out")
    if sweep is not None:
        run.print_plan(select(sweep, backend or [], filters or [], []), as_json)
        return
    request.check_device(device)
    listed = listing.everything(device)
    if as_json:
        out.print_json(json.dumps(listed.as_dict()))
    else:
        out.print(listed)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show the machine, versions, and what is missing.

    For each missing package, print the command that installs it.
    """
    findings = examine()
    if as_json:
        out.print_json(json.dumps([vars(finding) for finding in findings]))
        return
    for finding in findings:
        out.print(str(finding), soft_wrap=True)
    out.print(listing.backends(None), soft_wrap=True)


# `moebench --help` lists these commands in this order, after `list` and `doctor`.
for module in (run, parity, show, gate, ab, compare, advise):
    app.add_typer(module.commands)


def main() -> None:
    """Run the command line. Print the message of an error of the user on standard error and exit with its code."""
    try:
        code = app(standalone_mode=False)
    except MoebenchError as error:
        err.print(str(error))
        code = error.exit_code
    except _TyperUsageError as error:  # typer would print what the user typed as it is, with controls of the terminal
        message = io.StringIO()
        error.show(file=message)
        err.print(message.getvalue(), end="")
        code = error.exit_code
    raise SystemExit(code or EXIT_OK)


if __name__ == "__main__":
    main()
