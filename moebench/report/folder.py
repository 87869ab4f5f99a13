"""Write tables, plots and the report of a results folder.

The module does not import matplotlib before something is drawn: commands that draw nothing start in half the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from moebench.errors import PictureError, UsageError
from moebench.results.files import writable, write_atomically, writing_to
from moebench.results.frame import load, write, write_csv
from moebench.results.journal import JOURNAL_NAME
from moebench.run.stop import interruptible

if TYPE_CHECKING:
    from moebench.report.plots.figures import Drawn
    from moebench.verdicts.document import GateDocument

REPORT_NAME = "report.html"


@dataclass(frozen=True)
class Written:
    """The paths of the files that were written, and one line for each plot that could not be drawn."""

    paths: tuple[Path, ...] = ()
    failures: tuple[str, ...] = ()

    def sentence(self, folder: Path | None = None) -> str:
        """Return in one line what was written. Plots and traces are counted.

        Paths are relative to `folder`. If it is None, the line names the folder of the plots.
        """
        counted = {kind: [path for path in self.paths if path.parent.name == kind] for kind in ("plots", "traces")}
        texts = [
            str(path.relative_to(folder) if folder else path) for path in self.paths if path.parent.name not in counted
        ]
        for kind, paths in counted.items():
            if paths:
                texts.append(f"{len(paths)} files in {kind if folder else paths[0].parent}")
        return f"wrote {' and '.join(filter(None, (', '.join(texts[:-1]), texts[-1])))}"

    def check(self) -> None:
        """Raise PictureError if a plot could not be drawn."""
        if self.failures:
            raise PictureError(*self.failures)


def finish(folder: Path) -> Written:
    """Write Parquet, CSV, plots and report from the journal in `folder`. The paths include those of traces.

    Nothing is written if the folder has no journal. If the run was interrupted, the files have the rows that were
    measured before the interruption. The results are written before any plot is tried. Raises KeyboardInterrupt at a
    signal; each file is then either complete or unchanged.
    """
    if not (folder / JOURNAL_NAME).exists():
        return Written()
    frame = load(folder)
    with writing_to(folder), interruptible():
        return _with_plots(frame, folder, write(frame, folder), sorted((folder / "traces").glob("*.json")))


def rewrite(folder: Path) -> Written:
    """Write CSV, plots and report of the results in `folder` again. The Parquet file of the results does not change."""
    frame = load(folder)
    with writable(folder):
        return _with_plots(frame, folder, [write_csv(frame, folder)])


def _with_plots(frame: pd.DataFrame, folder: Path, before: list[Path], after: Sequence[Path] = ()) -> Written:
    """Write plots and the report with the plots. `before` and `after` are paths of other files."""
    from moebench.report.page import page
    from moebench.report.plots.figures import draw, write_plots

    drawn = draw(frame)
    plots = write_plots(drawn, folder / "plots")
    report = _write_page(page(frame, _svgs(drawn), folder), folder / REPORT_NAME)
    return Written((*before, *plots, report, *after), tuple(drawn.failures))


def _svgs(drawn: "Drawn") -> dict[str, bytes]:
    return {name: by_kind["svg"] for name, by_kind in drawn.images.items()}


def draw_plots(path: Path) -> Written:
    """Draw the plots of a results folder. `path` is the folder, or its Parquet file."""
    from moebench.report.plots.figures import draw, write_plots

    drawn, folder = draw(load(path)), _folder_of(path) / "plots"
    with writable(folder):
        return Written(tuple(write_plots(drawn, folder)), tuple(drawn.failures))


def write_report(path: Path, out: Path | None, gate: Path | None) -> Written:
    """Write the report of the results in `path`, which is a folder or a Parquet file.

    `out` is the file to write; None stands for report.html beside the results. `gate` is a file with the output of
    `moebench gate --json`, to show its verdicts in the report; None if there are no verdicts. Raises UsageError if the
    folder of `out` does not exist.
    """
    from moebench.report.page import page
    from moebench.report.plots.figures import draw

    frame, verdicts = load(path), None if gate is None else _verdicts(gate)
    out = out or _folder_of(path) / REPORT_NAME
    if not out.parent.is_dir():
        raise UsageError(
            f"--out {out}: there is no folder {out.parent}; make the folder, or name a file in another one"
        )
    drawn = draw(frame, ("svg",))
    html = page(frame, _svgs(drawn), _folder_of(path), verdicts)
    with writable(out):
        return Written((_write_page(html, out),), tuple(drawn.failures))


def _verdicts(gate: Path) -> "GateDocument":
    from moebench.verdicts.document import GateDocument  # imports scipy, which most reports do not need

    return GateDocument.read(gate)


def _write_page(html: str, out: Path) -> Path:
    write_atomically(out, html.encode())
    return out


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent
