"""Define the commands that put results side by side: `compare`, `merge` and `history`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.console import err, out
from moebench.cli.options import AsJson, Results
from moebench.errors import UsageError
from moebench.report.plots.settings import import_matplotlib
from moebench.results.files import writable

if TYPE_CHECKING:
    from moebench.results.folder import Result

commands = typer.Typer()

AsCsv = Annotated[bool, typer.Option("--csv", help="print CSV on standard output")]


@commands.command("compare")
def compare_(results: Results, as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """Show results side by side, with ratios to the first.

    The table has the times and the memory of each. --json and --csv also have the errors. There is no verdict.
    """
    from moebench.report.tables import comparetable  # these import pandas, which --help does not need
    from moebench.report.tables.contexttable import ContextTable
    from moebench.results.compare import beside_plain, compare
    from moebench.results.frame import to_csv, to_json

    opened = _opened(results)
    frame = compare({name: result.frame for name, result in opened.items()})
    if as_json:
        out.print_json(to_json(frame))
    elif as_csv:
        out.print_csv(to_csv(frame))
    else:
        out.print(comparetable.ComparisonTable(frame, tuple(opened)))
        for name, result in opened.items():
            if len(contexts := beside_plain(result.frame)):
                out.print(f"\n{name}", soft_wrap=True)
                out.print(ContextTable(contexts))
        for line in comparetable.environment_lines(opened):
            out.print(line, soft_wrap=True)


@commands.command("merge")
def merge_(
    results: Results,
    folder: Annotated[Path, typer.Option("--out", help="the folder to write; it must be new or empty")],
    newest: Annotated[
        bool, typer.Option("--newest", help="if several results have the same job, take the latest")
    ] = False,
    sessions: Annotated[
        bool,
        typer.Option("--sessions", help="if several results have the same job, keep the rounds of all as sessions"),
    ] = False,
) -> None:
    """Merge results folders into one, with their environments."""
    if newest and sessions:
        raise UsageError("--newest and --sessions exclude each other: choose one")
    from moebench.results.merge import merge

    for path in merge(results, folder, newest=newest, sessions=sessions):
        out.print(f"wrote {path}", soft_wrap=True)
    out.print(f"results: {folder}", soft_wrap=True)


@commands.command("history")
def history_(
    case_id: Annotated[
        str,
        typer.Argument(
            metavar="[CASE_ID]", help="a case_id, as `moebench list SWEEP --ids` prints it; not with --page"
        ),
    ],
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="results folders, their Parquet files, or a folder of results folders"),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="write one HTML page about all jobs instead")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="also draw the history, as PNG or SVG")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the times of one case over many results, or write a page about all jobs.

    The table is in order of time, oldest first. It has each backend's times and how they changed. The page of --page
    has every job of a series of results by revision and date, and marks where a time changed for good.
    """
    from moebench.report.tables.comparetable import history_table
    from moebench.results.frame import SAMPLE_COLUMNS, to_json
    from moebench.results.history import expanded, history

    if page is not None:
        if plot is not None or as_json:
            raise UsageError("--page with --plot or --json: the page is of all jobs; leave the other option out")
        from moebench.report.dashboard import write_dashboard

        write_dashboard(_opened(expanded([Path(case_id), *(results or [])])), page)
        out.print(f"wrote {page}", soft_wrap=True)
        return
    if not results:
        raise UsageError(f"moebench history {case_id}: there are no results; give results folders after the case_id")
    if plot is not None:
        import_matplotlib()
        from moebench.report.plots.history import draw_history, kind_of

        kind_of(plot)  # a wrong suffix is a mistake to tell before any work
    rows = history(case_id, {name: result.frame for name, result in _opened(expanded(results)).items()})
    if as_json:
        out.print_json(to_json(rows.drop(columns=list(SAMPLE_COLUMNS))))
    else:
        out.print(history_table(rows))
    if plot is not None:
        with writable(plot):
            draw_history(rows, plot)
        err.print(f"wrote {plot}")


def _opened(paths: list[Path]) -> Mapping[str, "Result"]:
    from moebench.results.compare import names_of
    from moebench.results.folder import open_result

    return dict(zip(names_of([str(path) for path in paths]), map(open_result, paths), strict=True))
