"""Read and write the journal of a run, the file to which moebench appends the record of each finished job."""

import json
import logging
import reprlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moebench.errors import ResultsError, UnreadableError, first_mistake
from moebench.results.record import READABLE, Record

LOG = logging.getLogger(__name__)

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

        Both are empty and 0 if the file does not exist. Raises ResultsError if a line is valid JSON but not a record.
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
            except (ValueError, RecursionError):
                torn += 1
                continue
            rows.append(record_of(fields, f"{self.path}:{number}"))
        return rows, torn


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")


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
