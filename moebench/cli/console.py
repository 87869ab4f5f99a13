"""Define the consoles of the command line. Results go to standard output, and messages go to standard error.

The consoles escape all text that they print (moebench.escapes): no text moves the cursor, changes a colour or the
direction of writing, or is a command of GitHub Actions. rich's markup in a text is shown as it is.
"""

import io
import logging
import sys
from contextlib import AbstractContextManager
from json import dumps, loads
from typing import IO, Any

from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.progress import Progress
from rich.text import Text

from moebench import escapes
from moebench.report import progress
from moebench.report.console import EscapingConsole


class _Lines:
    """A stream that hands on lines of which GitHub Actions reads none as a command."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(escapes.log(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Console(EscapingConsole):
    """A console for results. GitHub Actions takes none of its lines for a command."""

    file: Any = Console.file.getter(lambda self: _Lines(Console.file.fget(self)))  # type: ignore[attr-defined]

    def print_json(self, json: str | None = None, **how: Any) -> None:
        """Print a JSON document. The text that a program reads from it is not changed."""
        document = dumps(loads(json or "null"), indent=2, ensure_ascii=False)
        self.print(JSONHighlighter()(escapes.json(document)), soft_wrap=True)

    def print_csv(self, table: str) -> None:
        """Print a CSV table whose cells are escaped already."""
        self.file.write(table)


class _Messages(_Console):
    """A console for messages. Each text that it prints is one line: a newline in a name is escaped, too."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(escapes.line(text), **how)


out = _Console(highlight=False, soft_wrap=False, markup=False, emoji=False)
err = _Messages(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


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


def progress_bar() -> AbstractContextManager[Progress]:
    """Show a progress bar on standard error that disappears at the end."""
    return progress.progress_bar(err)


def job_progress() -> AbstractContextManager[progress.JobProgress]:
    """Show the progress of jobs on standard error: a bar on a terminal, else one line every few jobs."""
    return progress.job_progress(err)
