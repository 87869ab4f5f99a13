"""Write tables, plots and the report of a results folder."""

from pathlib import Path

import pandas as pd

from moebench.errors import UsageError
from moebench.report.page import REPORT_NAME, page
from moebench.report.plots.figures import all_figures, image, write_plots
from moebench.results.files import writable, write_atomically, writing_to
from moebench.results.frame import load, write, write_csv
from moebench.results.journal import JOURNAL_NAME
from moebench.run.runner import interruptible
from moebench.verdicts.document import GateDocument


def finish(folder: Path) -> list[Path]:
    """Write Parquet, CSV, plots and report from the journal in `folder`. Return the paths of all files and traces.

    The list is empty if the folder has no journal. If the run was interrupted, the files have the rows that were
    measured before the interruption. Raises KeyboardInterrupt at a signal; each file is then either complete or
    unchanged.
    """
    if not (folder / JOURNAL_NAME).exists():
        return []
    frame = load(folder)
    with writing_to(folder), interruptible():
        plots = write_plots(all_figures(frame), folder / "plots")
        written = [*write(frame, folder), *plots, _write_report(frame, plots, folder)]
    return [*written, *sorted((folder / "traces").glob("*.json"))]


def rewrite(folder: Path) -> list[Path]:
    """Write CSV, plots and report of the results in `folder` again. The Parquet file of the results does not change."""
    frame = load(folder)
    with writable(folder):
        plots = write_plots(all_figures(frame), folder / "plots")
        return [write_csv(frame, folder), *plots, _write_report(frame, plots, folder)]


def _write_report(frame: pd.DataFrame, plots: list[Path], folder: Path) -> Path:
    svgs = {path.stem: path.read_bytes() for path in plots if path.suffix == ".svg"}
    return _write_page(page(frame, svgs, folder), folder / REPORT_NAME)


def draw_plots(path: Path) -> list[Path]:
    """Draw the plots of a results folder. `path` is the folder, or its Parquet file."""
    figures, folder = all_figures(load(path)), _folder_of(path) / "plots"
    with writable(folder):
        return write_plots(figures, folder)


def write_report(path: Path, out: Path | None, gate: Path | None) -> Path:
    """Write the report of the results in `path`, which is a folder or a Parquet file. Return the path of the report.

    `out` is the file to write; None stands for report.html beside the results. `gate` is a file with the output of
    `moebench gate --json`, to show its verdicts in the report; None if there are no verdicts. Raises UsageError if the
    folder of `out` does not exist.
    """
    frame, verdicts = load(path), None if gate is None else GateDocument.read(gate)
    out = out or _folder_of(path) / REPORT_NAME
    if not out.parent.is_dir():
        raise UsageError(
            f"--out {out}: there is no folder {out.parent}; make the folder, or name a file in another one"
        )
    svgs = {name: image(figure, "svg") for name, figure in all_figures(frame)}
    html = page(frame, svgs, _folder_of(path), verdicts)
    with writable(out):
        return _write_page(html, out)


def _write_page(html: str, out: Path) -> Path:
    write_atomically(out, html.encode())
    return out


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent
