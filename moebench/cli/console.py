"""Define the consoles of the command line. Results go to standard output, and messages go to standard error."""

import io
import logging
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

out = Console(highlight=False, soft_wrap=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


class _OnStandardError(logging.Handler):
    """Prints each message once, however often the file that it is about is opened."""

    def __init__(self) -> None:
        super().__init__()
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if (message := record.getMessage()) not in self._printed:
            err.print(message)
        self._printed.add(message)


def messages_on_standard_error() -> None:
    """Print what moebench logs, such as lines of a journal that cannot be read, as lines on standard error.

    Names of files that are not UTF-8 are printed with backslashes, as Python prints them on standard error.
    """
    logging.getLogger("moebench").handlers = [_OnStandardError()]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def progress_bar() -> Progress:
    """Return a progress bar on standard error that disappears at the end."""
    columns = (
        SpinnerColumn(),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=err, transient=True)
