"""Define every error that a user may see. A message is one line: what is wrong, which value, the rule, the remedy.

    MoebenchError          base; the command line prints each of its `lines` and ends with `exit_code`
    ├── UsageError         2    the user asked for something that moebench cannot do
    ├── SweepError         2    a sweep, a filter or a backend's name is wrong; one line for each mistake
    ├── ResultsError       2    a file or folder cannot be opened as results
    │   └── UnreadableError 1   no line of a journal can be read
    ├── RevisionError      2    a revision or folder of `experts` cannot be measured
    ├── PictureError       1    a plot could not be drawn; all else was written; one line for each plot
    ├── InputsError        1    the inputs of a case cannot be made
    ├── RunnerError        1    a run cannot go on
    │   └── Refused        2    a run cannot begin, because a backend or a device is not there
    └── Interrupted        130  a signal ended the run

Any other exception is a bug of moebench and keeps its traceback. A module may define an exception for its own use, if
the exception never leaves the module.
"""

import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNDECIDED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


def first_mistake(error: "ValidationError") -> str:
    """Return in one line the first mistake that pydantic found: the field, its value, and the rule."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    value = "" if isinstance(first["input"], dict) else f" = {reprlib.repr(first['input'])}"
    message = "; ".join(first["msg"].removeprefix("Value error, ").splitlines())
    return f"{field}{value}: {message}" if field else message


def wrong_usage(error: Any, program: str) -> str:
    """Return one line on typer's error about a command line. typer itself would print four lines."""
    command = program if error.ctx is None else error.ctx.command_path
    told = error.format_message()
    return f"{told}{'' if told.endswith(('.', '?')) else '.'} See `{command} --help`."


class MoebenchError(Exception):
    """The base of all errors that moebench raises on purpose. Each argument is one line of the message."""

    exit_code: ClassVar[int] = EXIT_USAGE

    @property
    def lines(self) -> Sequence[str]:
        """The lines of the message. A name in a line may have a newline: whoever prints the line escapes it."""
        return [str(line) for line in self.args]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class UsageError(MoebenchError):
    """The user asked for something that moebench cannot do."""


class SweepError(MoebenchError):
    """A sweep, a filter or a backend's name that cannot be used. `mistakes` has every mistake, one line each."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__(mistakes)
        self.mistakes = list(mistakes)

    @property
    def lines(self) -> Sequence[str]:
        return self.mistakes


class ResultsError(MoebenchError):
    """A file or folder that cannot be opened as results."""


class UnreadableError(ResultsError):
    """A journal in which no line can be read."""

    exit_code = EXIT_FAILED


class RevisionError(MoebenchError):
    """A revision or folder of `experts` that cannot be measured."""


class PictureError(MoebenchError):
    """Plots could not be drawn. Everything else was written. The message has one line for each plot."""

    exit_code = EXIT_FAILED


class InputsError(MoebenchError, ValueError):
    """The inputs of a case cannot be made."""

    exit_code = EXIT_FAILED


class RunnerError(MoebenchError):
    """A run that cannot go on. The message says what happened and where to look."""

    exit_code = EXIT_FAILED


class Refused(RunnerError):
    """A run that cannot begin because a requested backend or device is not there. The message has one line for each."""

    exit_code = EXIT_USAGE


class Interrupted(MoebenchError):
    """A signal ended the run. The message says where the results that were already measured are."""

    exit_code = EXIT_INTERRUPTED
