"""Read and write the journal of a run, the file to which moebench appends the record of each finished job."""

import json
import logging
import os
import re
import reprlib
import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from moebench.errors import ResultsError, UnreadableError, first_mistake
from moebench.results.files import CANNOT_WRITE, content_of, write_again
from moebench.results.record import READABLE, Record

LOG = logging.getLogger(__name__)

#: The clock of files moves in steps: of milliseconds on a local disk, and of two seconds at most. Two changes within a
#: step have the same time.
CLOCK_STEP_NS = 2 * 10**9
_READABLE = " and ".join(map(str, READABLE))


class Journal:
    """The records of a run, one JSON object per line. `append` writes a line when a job is finished.

    If a process is killed while it writes, the last line may be torn, which means that its end is missing. `read` skips
    torn lines and counts them.

    A backend runs as the same user, so it can remove or change the file. A journal that was appended to therefore holds
    the file's content: `keep` finds out whether the file is still what was written, and writes it again if it is not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = path.parent.resolve() / path.name  # the working folder may change
        self._held: bytearray | None = None
        self._seen: tuple[int, ...] | None = None  # the file that held `_held` when moebench last looked
        self._is_settled = False  # whether every later change shows in `_identity`
        self.num_restored = 0

    def append(self, row: Record) -> None:
        """Write the record's line. Raises an OSError in `CANNOT_WRITE`, and RunnerError as `keep` does."""
        self.keep()
        if self._held is None:
            self._held = bytearray(content_of(self._place) or b"")
        line = row.to_json().encode() + b"\n"
        if self._held and not self._held.endswith(b"\n"):
            line = b"\n" + line  # the file ends with a torn line: do not append to that line
        try:
            self._add(line)
        except OSError as error:
            if error.errno in CANNOT_WRITE:
                raise
            self._seen = None
        self._held += line
        if self._seen is None:
            self.keep()

    def _add(self, line: bytes) -> None:
        """Write the line to the file. Remember the file only if it holds all lines for certain.

        Another process may replace the file at any moment, even by a pipe that nobody reads. So it never waits.
        It looks at the file that it has opened, and not at what the path names before or after.
        """
        file = os.open(self._place, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        with os.fdopen(file, "ab") as opened:
            is_known = _identity(os.fstat(file)) == self._seen
            if is_known or self._seen is None:
                opened.write(line)
                opened.flush()
            self._seen, self._is_settled = _identity(os.fstat(file)) if is_known else None, False

    def keep(self) -> None:
        """Write the file again if it is no longer what `append` wrote. Raises RunnerError if this is not possible."""
        if self._held is None:
            return
        now = _identity_of(self._place)
        if now is not None and now == self._seen and self._is_settled:
            return
        self._seen, self._is_settled = now, now is not None and time.time_ns() - now[-1] > CLOCK_STEP_NS
        if content_of(self._place) != bytes(self._held):
            self.num_restored += 1
            write_again(self._place, bytes(self._held))
            self._seen = None

    def __iter__(self) -> Iterator[Record]:
        return iter(self.read()[0])

    def read(self) -> tuple[list[Record], int]:
        """Return the records, the oldest first, and the number of torn lines that were skipped.

        Both are empty and 0 if the file does not exist. Raises ResultsError if a line is valid JSON but not a record.
        """
        rows: list[Record] = []
        torn = 0
        if not self.path.exists():
            return rows, torn
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            if _WRITTEN.search(line):
                with suppress(ValidationError):  # what is wrong is found below
                    rows.append(Record.model_validate_json(line))
                    continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                torn += 1
                continue
            rows.append(record_of(fields, f"{self.path}:{number}"))
        return rows, torn


#: The end of a line that `append` writes, with a schema that this moebench reads. pydantic reads such a line in half
#: the time, but its messages do not tell a torn line from a wrong record.
_WRITTEN = re.compile(rb'"schema":(%s)\}$' % b"|".join(str(schema).encode() for schema in READABLE))


def _identity_of(path: Path) -> tuple[int, ...] | None:
    try:
        return _identity(path.stat())
    except OSError:
        return None


def _identity(file: os.stat_result) -> tuple[int, ...]:
    """Return what changes if another process replaces or writes the file, and last, when the file last changed.

    A process can set the time of the last write, but not that of the last change.
    """
    return file.st_dev, file.st_ino, file.st_size, file.st_ctime_ns


JOURNAL_NAME = "journal.jsonl"


def read_journal(path: Path) -> list[Record]:
    """Return the records of a journal, the oldest first. The list is empty if the file is empty or does not exist.

    A warning is logged if some lines cannot be read. Raises UnreadableError if no line can be read, and ResultsError if
    the file is not a journal of this moebench.
    """
    rows, torn = Journal(path).read()
    folder = shlex.quote(str(path.parent))
    lines = f"{path}: {torn} of {torn + len(rows)} lines cannot be read"
    again = f"`moebench run --resume {folder}` measures again what is missing"
    if torn and not rows:
        raise UnreadableError(f"{lines}; {again}; or give other results")
    if torn:
        LOG.warning("%s and are left out; %s", lines, again)
    return rows


def record_of(fields: object, place: str) -> Record:
    """Return the record with these fields of a journal or a Parquet file.

    Raises ResultsError, which names `place`, if the fields are not those of a record that this moebench reads.
    """
    if not isinstance(fields, dict):
        raise ResultsError(
            f"{place}: {reprlib.repr(fields)} is wrong; a line holds one record, a JSON object; "
            "give a journal that `moebench run` wrote"
        )
    if fields.get("schema") not in READABLE:
        raise ResultsError(
            f"{place}: schema {reprlib.repr(fields.get('schema'))}, this moebench reads {_READABLE}; "
            "open it with the moebench that wrote it"
        )
    try:
        return Record.model_validate(fields)
    except ValidationError as error:
        raise ResultsError(f"{place}: {first_mistake(error)}; open it with the moebench that wrote it") from error
