"""A results folder, from its plan to its tables and plots. No torch here."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moebench.environment import Environment
from moebench.frame import JOURNAL_NAME, load, read_journal, write, write_atomically
from moebench.pagegate import read_gate
from moebench.plan import Refused, UsageError, writable
from moebench.plots import all_figures, image, write_plots
from moebench.record import Record
from moebench.report import REPORT_NAME, page
from moebench.resume import SWEEP_NAME, environment_changes, locked
from moebench.runner import Outcome, execute, interruptible, writing_to
from moebench.runplan import RunPlan, check_new


def measure(run_plan: RunPlan, on_record: Callable[[Record], None]) -> Outcome:
    """Run the plan into its folder. A run that is refused leaves none: the command, set right, may name it again.

    The outcome has earlier records too. Raises UsageError where another process writes into the folder.
    """
    folder = run_plan.folder
    with writing_to(folder), locked(folder):
        _check_unchanged(run_plan)
        write_atomically(folder / SWEEP_NAME, run_plan.sweep_text)
        run_plan.run.write(folder)

        def check(environment: Environment) -> None:
            changes = environment_changes(folder, environment) if run_plan.is_resumed else []
            if changes and not run_plan.force:
                raise Refused(
                    f"--resume {folder}: not where it was: {'; '.join(changes)}; --force goes on all the same"
                )

        try:
            outcome = execute(
                *run_plan.rounds, on_record=on_record, on_environment=check, time_budget_s=run_plan.time_budget_s
            )
        except Refused:
            if not (run_plan.is_resumed or (folder / JOURNAL_NAME).exists()):
                _remove(folder)
            raise
    return replace(outcome, records=(*run_plan.earlier, *outcome.records))


def _check_unchanged(run_plan: RunPlan) -> None:
    """Another run may have come and gone between the plan and the lock."""
    folder = run_plan.folder
    if not run_plan.is_resumed:
        check_new(folder)
    elif len(read_journal(folder / JOURNAL_NAME)) != len(run_plan.earlier):
        raise UsageError(f"{folder}: another process has gone on with it meanwhile; give the command again")


def _remove(folder: Path) -> None:
    """A folder that was empty, or not there, before this run."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with suppress(OSError):  # a link to a folder stays, and where this process is
        folder.rmdir()


def finish(folder: Path) -> list[Path]:
    """Parquet, CSV, plots and report from the journal. What was measured before an interruption counts too.

    Raises KeyboardInterrupt at a signal; each file is then whole or as it was.
    """
    if not (folder / JOURNAL_NAME).exists():
        return []
    frame = load(folder)
    with writing_to(folder), interruptible():
        plots = write_plots(all_figures(frame), folder / "plots")
        svgs = {path.stem: path.read_bytes() for path in plots if path.suffix == ".svg"}
        written = [*write(frame, folder), *plots, _write_page(page(frame, svgs, folder), folder / REPORT_NAME)]
    return [*written, *sorted((folder / "traces").glob("*.json"))]


def draw(path: Path) -> list[Path]:
    """Draw the plots of a results folder, or of a Parquet file beside it."""
    figures, folder = all_figures(load(path)), _folder_of(path) / "plots"
    with writable(folder):
        return write_plots(figures, folder)


def report(path: Path, out: Path | None, gate: Path | None) -> Path:
    """Write the report of a results folder or of a Parquet file, by default beside it, with the verdicts in `gate`."""
    frame, verdicts = load(path), None if gate is None else read_gate(gate)
    out = out or _folder_of(path) / REPORT_NAME
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}; make it, or name a file elsewhere")
    svgs = {name: image(figure, "svg") for name, figure in all_figures(frame)}
    html = page(frame, svgs, _folder_of(path), verdicts)
    with writable(out):
        return _write_page(html, out)


def _write_page(html: str, out: Path) -> Path:
    write_atomically(out, html.encode())
    return out


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent
