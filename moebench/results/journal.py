"""Read and write the journal of a run, the file to which moebench appends the record of each finished job."""

import json
import reprlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from moebench.errors import ResultsError
from moebench.results.files import write_again
from moebench.results.record import READABLE, Record

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
        self._seen: tuple[int, ...] = ()
        self.num_restored = 0

    def append(self, row: Record) -> None:
        """Write the record's line. Raises OSError if it cannot be written, and RunnerError as `keep` does."""
        self.keep()
        if self._held is None:
            self._held = bytearray(self._place.read_bytes() if self._place.is_file() else b"")
        line = row.to_json().encode() + b"\n"
        if self._held and not self._held.endswith(b"\n"):
            line = b"\n" + line  # the file ends with a torn line: do not append to that line
        with self._place.open("ab") as file:
            file.write(line)
        self._held += line
        self._seen = _identity(self._place)

    def keep(self) -> None:
        """Write the file again if it is no longer what `append` wrote. Raises RunnerError if this is not possible."""
        if self._held is None or _identity(self._place) == self._seen:
            return
        if not (self._place.is_file() and self._place.read_bytes() == self._held):
            self.num_restored += 1
            write_again(self._place, bytes(self._held))
        self._seen = _identity(self._place)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.read()[0])

    def read(self) -> tuple[list[Record], int]:
        """Return the records, the oldest first, and the number of torn lines that were skipped.

        Both are empty and 0 if the file does not exist. Raises ResultsError if a line is valid JSON but not an object,
        or has another schema. Raises ValidationError if the fields of a line are not the fields of a record.
        """
        rows: list[Record] = []
        torn = 0
        if not self.path.exists():
            return rows, torn
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError:
                torn += 1
                continue
            if not isinstance(fields, dict):
                raise ResultsError(
                    f"{self.path}:{number}: {reprlib.repr(fields)} is wrong; a line holds one record, a JSON object; "
                    "give a journal that `moebench run` wrote"
                )
            if fields.get("schema") not in READABLE:
                raise ResultsError(
                    f"{self.path}:{number}: schema {fields.get('schema')!r}, this moebench reads {_READABLE}; "
                    "open it with the moebench that wrote it"
                )
            rows.append(Record.model_validate_json(line))
        return rows, torn


def _identity(path: Path) -> tuple[int, ...]:
    """Return what changes if another process replaces or writes the file; empty if there is no file."""
    try:
        now = path.stat()
    except OSError:
        return ()
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns


JOURNAL_NAME = "journal.jsonl"


def read_journal(path: Path) -> list[Record]:
    """Return the records of a journal, the oldest first. The list is empty if the file does not exist.

    Raises ResultsError if the file is not a journal of this moebench.
    """
    try:
        return list(Journal(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "a line"
        raise ResultsError(
            f"{path}: {field}: {first['msg']}; this is not a record of this moebench; "
            "open it with the moebench that wrote it"
        ) from error
