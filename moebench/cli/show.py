"""Define the commands that show one results folder: `show`, `plots` and `report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.console import out
from moebench.cli.options import AsJson, Folder
from moebench.errors import ResultsError, UsageError
from moebench.report.plots.settings import import_matplotlib
from moebench.workload.selection import filter_jobs

if TYPE_CHECKING:
    import pandas as pd

    from moebench.report.folder import Written

commands = typer.Typer()

RowFilters = Annotated[
    list[str] | None,
    typer.Option("--filter", help="only rows with KEY=V1,V2 …, as in moebench run; repeatable"),
]


@commands.command()
def show(
    folder: Folder,
    only_best: Annotated[
        bool, typer.Option("--best", help="print only the fastest backend of each case, with its lead and its memory")
    ] = False,
    filters: RowFilters = None,
    sort: Annotated[
        str | None, typer.Option(help="order of the backends of a case: time, memory, backend; default: time")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the tables of a results folder.

    The first table has the best backend of each case. The others have all backends of each case, the fastest first.
    """
    if only_best and sort is not None:
        raise UsageError(f"--sort {sort} with --best: there is one backend for each case; leave one of the two out")
    if as_json and sort is not None:
        raise UsageError(f"--sort {sort} with --json: JSON keeps the order of the results; leave one of the two out")
    from moebench.report.ranking import best  # these import pandas, which --help does not need
    from moebench.report.tables.besttable import BestTable
    from moebench.report.tables.tables import summary
    from moebench.results.frame import load, to_json

    frame = filtered(load(folder), filters or [])
    if frame.empty and filters:
        raise ResultsError(f"{folder}: no row is left by --filter {' --filter '.join(filters)}; leave a filter out")
    if as_json:
        out.print_json(to_json(best(frame) if only_best else frame))
    else:
        out.print(BestTable(frame) if only_best else summary(frame, sort or "time"))


def filtered(frame: "pd.DataFrame", filters: Sequence[str]) -> "pd.DataFrame":
    """Return the rows of the jobs that pass every filter. Raises SweepError for a wrong filter."""
    if not filters:
        return frame
    from moebench.results.folder import rows_of
    from moebench.verdicts.findings import job_of  # imports scipy

    jobs = [job_of(row) for row in rows_of(frame)]
    kept = set(filter_jobs(jobs, filters))
    return frame[[job in kept for job in jobs]].reset_index(drop=True)


@commands.command()
def plots(folder: Folder) -> None:
    """Draw the plots of a results folder again. Exit code 1: a plot could not be drawn."""
    import_matplotlib()
    from moebench.report.folder import draw_plots
    from moebench.results.published import is_packaged

    if is_packaged(folder):
        raise UsageError(
            f"moebench plots {folder.name}: the results are a part of the installed package, where nothing is written; "
            f"copy {folder} to a place of your own"
        )
    _print(draw_plots(folder))


@commands.command()
def report(
    folder: Folder,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="the page to write; default: report.html beside your results, or here")
    ] = None,
    gate: Annotated[
        Path | None, typer.Option(help="a file with the output of `moebench gate --json`, to add its verdicts")
    ] = None,
) -> None:
    """Write one HTML page about a results folder.

    The page has the verdict, plots, a table with filters, and commands that measure rows again. Exit code 1: a plot
    could not be drawn, and the page lacks it.
    """
    import_matplotlib()
    from moebench.report.folder import REPORT_NAME, write_report
    from moebench.results.published import is_packaged

    if out_file is None and is_packaged(folder):
        out_file = Path(REPORT_NAME)
    _print(write_report(folder, out_file, gate))


def _print(written: "Written") -> None:
    """Print what was written. Raises PictureError if a plot could not be drawn."""
    if len(written.paths) == 1:
        out.print(f"wrote {written.paths[0]}", soft_wrap=True)
    elif written.paths:
        out.print(written.sentence(), soft_wrap=True)
    written.check()
