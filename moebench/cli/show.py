"""Define the commands that show one results folder: `show`, `plots` and `report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.console import out
from moebench.cli.options import AsJson, Folder
from moebench.errors import UsageError
from moebench.report.plots.settings import import_matplotlib

if TYPE_CHECKING:
    from moebench.report.folder import Written

commands = typer.Typer()


@commands.command()
def show(folder: Folder, as_json: AsJson = False) -> None:
    """Print the table of a results folder."""
    from moebench.report.tables.tables import summary
    from moebench.results.frame import load, to_json

    frame = load(folder)
    if as_json:
        out.print_json(to_json(frame))
    else:
        out.print(summary(frame))


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
    """Print the paths. Raises PictureError if a plot could not be drawn."""
    for path in written.paths:
        out.print(f"wrote {path}", soft_wrap=True)
    written.check()
