"""Define the command `moebench`, which collects the subcommands of the other modules. No module imports this module.

The exit codes are:

    0    success; the statuses unsupported and oom also count as success
    1    a job ended as a mismatch, timeout, crash or error; gate or ab found a regression or a missing job
    2    bad usage
    3    gate or ab could not decide, or advise found no data
    130  interrupted
"""

import gc
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import typer

from moebench import __version__
from moebench.cli.console import err, messages_on_standard_error, out
from moebench.cli.lazy import Entry, LazyGroup
from moebench.cli.options import AsJson, Backends, Filters, Only
from moebench.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, MoebenchError, UsageError, wrong_usage
from moebench.results.files import CANNOT_WRITE

#: Python looks for cycles of objects after so many new ones; by default after 700. Results are millions of objects
#: without cycles, and with the default it would look for a quarter of the time.
_OBJECTS_BETWEEN_COLLECTIONS = 100_000

_TyperUsageError: Any = typer.BadParameter.__bases__[0]  # typer has no public name for it


class Commands(LazyGroup):
    """The commands of `moebench`. `moebench --help` lists them in this order, after `list` and `doctor`."""

    entries: ClassVar = {
        "run": Entry("moebench.cli.run", "Measure a sweep: check every job and time it."),
        "parity": Entry(
            "moebench.cli.parity", "Search for a case on which a backend is wrong, and print the smallest one."
        ),
        "show": Entry("moebench.cli.show", "Print the tables of a results folder."),
        "plots": Entry("moebench.cli.show", "Draw the plots of a results folder again."),
        "report": Entry("moebench.cli.show", "Write one HTML page about a results folder."),
        "gate": Entry("moebench.cli.gate", "Judge new results against a baseline."),
        "baseline": Entry("moebench.cli.gate", "Store and list the results that a gate compares with."),
        "ab": Entry("moebench.cli.ab", "Measure two revisions in turn and judge the second."),
        "compare": Entry("moebench.cli.compare", "Show results side by side, with ratios to the first."),
        "merge": Entry("moebench.cli.compare", "Merge results folders into one, with their environments."),
        "history": Entry(
            "moebench.cli.compare", "Show the times of one case over many results, or write a page about all jobs."
        ),
        "advise": Entry("moebench.cli.advise", "Rank the backends for a workload, by measured results."),
        "tune": Entry(
            "moebench.cli.tune",
            "Measure tiles of the engine triton on this GPU, and store those that are faster than the default.",
        ),
    }


app = typer.Typer(
    name="moebench",
    cls=Commands,
    help="Measure, check and compare the expert layers of Mixture-of-Experts models.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
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
    only: Only = None,
    filters: Filters = None,
    device: Annotated[
        str | None, typer.Option(help="list what can run on this device; default: a GPU if there is one")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="print the case_id of each case, too")] = False,
    as_json: AsJson = False,
) -> None:
    """List sweeps and backends, or the jobs of one sweep.

    The list says why a backend cannot run here. With SWEEP it has estimates of the jobs' memory and time.
    """
    if sweep is not None and device is not None:
        raise UsageError(f"--device {device} with SWEEP: a sweep has the same jobs on every device; leave --device out")
    if sweep is None and (backend or only or filters or ids):
        raise UsageError("--backend, --only, --filter and --ids need a SWEEP: give a SWEEP, or leave them out")
    if sweep is not None:
        from moebench.cli import run
        from moebench.workload.selection import select

        run.print_plan(select(sweep, backend or [], filters or [], [], only or []), as_json, ids)
        return
    from moebench.cli import listing

    if device is not None:
        from moebench.run.request import check_device

        check_device(device)
    listed = listing.everything(device)
    if as_json:
        out.print_json(json.dumps(listed.as_dict()))
    else:
        out.print(listed)


@app.command()
def doctor(
    thorough: Annotated[
        bool,
        typer.Option("--thorough", help="also import torch and every library, and ask every backend: some seconds"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the machine, versions, and what is missing.

    For each missing package, print the command that installs it.
    """
    from moebench.cli import listing
    from moebench.machine.doctor import doctor as examine

    findings = examine(is_thorough=thorough)
    if as_json:
        out.print_json(json.dumps([vars(finding) for finding in findings]))
        return
    for finding in findings:
        out.print(str(finding), soft_wrap=True)
    out.print(listing.backends(thorough), soft_wrap=True)


def main() -> None:
    """Run the command line. Print the message of an error on standard error and exit with its code.

    A user sees the messages of a MoebenchError, and of an OSError that names a file or a full disk. Any other exception
    is a mistake of moebench.
    """
    messages_on_standard_error()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    # Arrow's own pool gives memory back and takes it again, which takes a tenth of the time of `show`
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        _check_arguments(sys.argv[1:])
        code = app(prog_name="moebench", standalone_mode=False)
    except MoebenchError as error:
        for line in error.lines:
            err.print(line)
        code = error.exit_code
    except _TyperUsageError as error:  # typer would print controls of the terminal that the user typed
        err.print(wrong_usage(error, "moebench"))
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
