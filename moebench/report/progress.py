"""Show how far a run is: as a bar on a terminal or in a notebook, and elsewhere as one line every few jobs."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from moebench.results.record import Record

_BAR_WIDTH = 20
_BESIDE = 45  # columns of the spinner, the bar, the counts and the time, with the gaps after them
#: Without a terminal, a run prints about as many lines, and at most one for so many jobs.
_LINES, _FEWEST_JOBS = 20, 10


class _Description(ProgressColumn):
    """The description of a task, cut to the room that the bar leaves. It never moves the bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        text = Text(task.description)
        text.truncate(max(1, self._console.width - _BESIDE), overflow="ellipsis")
        return text


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Show a progress bar that disappears at the end.

    If the console is not a terminal, the bar is never started: at its end, rich would print an empty line there.
    """
    columns = SpinnerColumn(), BarColumn(_BAR_WIDTH), MofNCompleteColumn(), TimeRemainingColumn(), _Description(console)
    progress = Progress(*columns, console=console, transient=True)
    with progress if console.is_interactive or console.is_jupyter else nullcontext():
        yield progress


class JobProgress:
    """Shows the jobs of a run that are done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self._total = 0
        self._counts: Counter[str] = Counter()

    def plan(self, total: int, doing: str = "") -> None:
        """Begin with `total` jobs."""
        self._total, self._counts = total, Counter()
        self._progress.update(self._task, total=total, completed=0, description=doing)

    def done(self, row: "Record") -> None:
        """Count a job that has a record."""
        status = row.status.value
        self._counts[status] += 1
        self._progress.update(self._task, advance=1, description=f"{row.backend} {status} {row.check or row.case_id}")
        num_done = self._counts.total()
        if not self._is_shown and num_done < self._total and num_done % self._step == 0:
            counts = ", ".join(f"{count} {name}" for name, count in self._counts.items())
            self._progress.console.print(f"{num_done} of {self._total} jobs: {counts}; last: {row.backend}")

    def doing(self, what: str) -> None:
        """Say what happens after the last job, while the bar stays."""
        self._progress.update(self._task, description=what)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.print(text)

    @property
    def _is_shown(self) -> bool:
        return self._progress.live.is_started

    @property
    def _step(self) -> int:
        return max(_FEWEST_JOBS, math.ceil(self._total / _LINES))


@contextmanager
def job_progress(console: Console) -> Iterator[JobProgress]:
    """Show the progress of jobs on the console until the block ends."""
    with progress_bar(console) as progress:
        yield JobProgress(progress)
