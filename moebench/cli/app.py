"""Define the command `moebench`, which collects the subcommands of the other modules. No module imports this module.

The exit codes are:

    0    success; the statuses unsupported and oom also count as success
    1    a job ended as a mismatch, timeout, crash or error; gate or ab found a regression or a missing job
    2    bad usage
    3    gate or ab could not decide, or advise found no data
    130  interrupted
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from moebench import __version__
from moebench.cli import ab, advise, compare, gate, listing, parity, run, show, tune
from moebench.cli.console import err, messages_on_standard_error, out
from moebench.cli.options import AsJson, Backends, Filters
from moebench.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, MoebenchError, UsageError
from moebench.machine.doctor import doctor as examine
from moebench.results.files import CANNOT_WRITE
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
for module in (run, parity, show, gate, ab, compare, advise, tune):
    app.add_typer(module.commands)


def main() -> None:
    """Run the command line. Print the message of an error on standard error and exit with its code.

    A user sees the messages of a MoebenchError, and of an OSError that names a file or a full disk. Any other exception
    is a mistake of moebench.
    """
    messages_on_standard_error()
    try:
        _check_arguments(sys.argv[1:])
        code = app(prog_name="moebench", standalone_mode=False)
    except MoebenchError as error:
        for line in error.lines:
            err.print(line)
        code = error.exit_code
    except _TyperUsageError as error:  # typer would print four lines, with controls of the terminal that the user typed
        command = error.ctx.command_path if error.ctx is not None else "moebench"
        told = error.format_message()
        err.print(f"{told}{'' if told.endswith(('.', '?')) else '.'} See `{command} --help`.")
        code = error.exit_code
    except OSError as error:
        if error.filename is None and error.errno not in CANNOT_WRITE:
            raise
        place = "standard output" if error.filename is None else os.fsdecode(error.filename)
        err.print(f"{place}: {error.strerror}; correct the name, or make room there")
        code = EXIT_FAILED if error.errno in CANNOT_WRITE else EXIT_USAGE
    raise SystemExit(code or EXIT_OK)


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raise UsageError for an argument that no file of results could hold."""
    for argument in arguments:
        try:
            whole = argument.encode()
        except UnicodeEncodeError as error:
            text = os.fsencode(argument).decode(errors="backslashreplace")
            raise UsageError(f"{text}: it must be UTF-8, because results name it; rename the file or folder") from error
        if b"\0" in whole:
            raise UsageError(f"{argument!r}: an argument cannot have the character NUL; leave it out")


if __name__ == "__main__":
    main()
