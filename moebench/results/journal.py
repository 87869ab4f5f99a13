"""Read and write the journal of a run, the file to which moebench appends the record of each finished job."""

import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moebench.errors import ResultsError
from moebench.results.record import READABLE, Record

_READABLE = " and ".join(map(str, READABLE))


class Journal:
    """The records of a run, one JSON object per line. `append` writes a line when a job is finished.

    If a process is killed while it writes, the last line may be torn, which means that its end is missing. `read` skips
    torn lines and counts them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Record) -> None:
        line = row.to_json() + "\n"
        with self.path.open("ab+") as file:
            if file.tell() and not _ends_a_line(file):
                line = "\n" + line  # the file ends with a torn line: do not append to that line
            file.write(line.encode())

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


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")


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
