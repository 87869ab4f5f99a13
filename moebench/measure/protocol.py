"""Read and write the two files between a supervisor and its worker: the file of jobs, and the file of events.

A backend runs in the worker, and it can reach both files. The supervisor therefore reads events by descriptor, and
believes only lines that it can check: each has the worker's token, and counts on from the line before it.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TextIO

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from moebench.machine.environment import Environment
from moebench.results.record import Record
from moebench.workload.case import Job
from moebench.workload.spec import Policy

#: A worker looks for its next job once per this many seconds.
TAIL_POLL_S = 0.005
#: The number of checked passes (forward and, in mode train, backward) of a job. All passes must be right. The first
#: pass is not enough, because in it a buffer is often clean by chance.
PASSES = 2
#: The environment variable with a worker's token. Processes that a backend starts inherit it, so that the supervisor
#: finds and ends them.
TOKEN = "MOEBENCH_WORKER"
#: A text that comes from a backend keeps at most this many characters. The reason of a failed check also has the lines
#: of Python that show it.
TEXT_CHARS, LISTING_CHARS = 4000, 20_000
#: The supervisor reads at most this many bytes of events at once, and no event is longer.
MOST_BYTES = 1 << 26


def told(text: object, most: int = TEXT_CHARS) -> str:
    """Return a text of a backend as results may hold it: no lone surrogates, no NUL, and about `most` characters.

    Where a text is longer, its middle is left out.
    """
    try:
        clean = str(text).replace("\0", r"\0").encode(errors="backslashreplace").decode()
    except Exception as error:
        clean = f"<{type(error).__name__} while moebench read the text>"
    if len(clean) > most:
        note = f" [… {len(clean) - most} characters left out …] "
        clean = clean[: most // 4] + note + clean[len(clean) - (most - most // 4) :]
    return clean


class WorkList(BaseModel):
    """The jobs that a worker must measure, and their round.

    If `jobs` is empty, the supervisor adds jobs later. `backends` are the backends of all jobs, and `dp_size` is the
    same for all jobs. `are_checks` is true if all jobs are checks, and false if no job is a check. If `experts_folder`
    is not None, the package `experts` must be imported from that folder. If `traces` is not None, each job writes a
    profiler trace to that folder.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    policy: Policy
    jobs: tuple[Job, ...] = ()
    backends: tuple[str, ...] = ()
    are_checks: bool = False
    round: int = 0
    dp_size: int = 1
    experts_folder: Path | None = None
    traces: Path | None = None


def read_jobs(path: Path) -> tuple[WorkList, Iterator[Job]]:
    """Return the work list in the file's first line, and an iterator over the jobs.

    If the work list has no jobs, the iterator waits for jobs in the lines below.
    """
    file = path.open(encoding="utf-8")
    work_list = WorkList.model_validate_json(file.readline())
    return work_list, iter(work_list.jobs) if work_list.jobs else _jobs_to_come(file)


def _jobs_to_come(file: TextIO) -> Iterator[Job]:
    line = ""
    while True:
        line += file.readline()
        if line.endswith("\n"):
            yield Job.model_validate_json(line)
            line = ""
        else:
            time.sleep(TAIL_POLL_S)


class Events:
    """A worker's end of the file of events; each event is one line of JSON."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._token, self._rank = os.environ.get(TOKEN, ""), int(os.environ.get("RANK", "0"))
        self._count = 0

    def emit(self, kind: str, **fields: Any) -> None:
        whose = {"token": self._token, "rank": self._rank, "count": self._count}
        self._file.write(json.dumps({"kind": kind, **whose, **fields}) + "\n")
        self._file.flush()
        self._count += 1


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str
    rank: int
    count: int


class Ready(_Event):
    kind: Literal["ready"]
    environment: Environment


class Mistaken(_Event):
    """The worker refuses its jobs."""

    kind: Literal["refused"]
    mistakes: tuple[str, ...]


class Started(_Event):
    kind: Literal["start"]
    number: int


class Tries(_Event):
    kind: Literal["trial"]
    trial: str


class Recorded(_Event):
    kind: Literal["record"]
    number: int
    record: Record


Event = Ready | Mistaken | Started | Tries | Recorded
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class Source(Protocol):
    """A file of events as the supervisor reads it. `fault` says what is wrong with it, and is empty if all is well."""

    fault: str

    def read(self) -> bytes:
        """Return the bytes that were written since the last call."""

    def close(self) -> None: ...


class EventFile:
    """The file of events of a worker on this machine, read by descriptor."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb+", buffering=0)
        self._num_bytes = 0
        self.fault = ""

    def read(self) -> bytes:
        now = os.fstat(self._file.fileno())
        if now.st_size < self._num_bytes:
            self.fault = "the file of its events was cut short"
            return b""
        if not now.st_nlink:
            self.fault = "the file of its events was deleted"  # what it has can still be read
        # to read at most so many bytes would make room for them at every look
        found = self._file.read(min(MOST_BYTES, now.st_size - self._num_bytes)) or b""
        self._num_bytes += len(found)
        return found

    def close(self) -> None:
        self._file.close()


class EventReader:
    """The supervisor's end of the files of events of one worker, one file for each machine.

    `read` returns the events since the last call that can be believed, up to the first line that cannot. `fault` then
    says what is wrong with a file; it is empty as long as all is well.
    """

    def __init__(self, sources: Sequence[Source], token: str) -> None:
        self._sources, self._token = sources, token
        self._torn = [b""] * len(sources)
        self._counts: dict[int, int] = {}  # rank -> number of its lines
        self.source_of: dict[int, int] = {}  # rank -> number of the file with its lines
        self.fault = ""

    def read(self) -> list[Event]:
        events: list[Event] = []
        for number, source in enumerate(self._sources):
            if not self.fault:
                events += self._read(number, source)
        return events

    def _read(self, number: int, source: Source) -> list[Event]:
        found = source.read()
        self.fault = source.fault
        *lines, self._torn[number] = (self._torn[number] + found).split(b"\n")
        events: list[Event] = []
        for line in lines:
            event = self._checked(line, number)
            if event is None:
                beginning = told(line[:200].decode(errors="replace"))
                self.fault = f"the file of its events has a line that the worker did not write: {beginning}"
                return events
            events.append(event)
        if len(self._torn[number]) > MOST_BYTES:
            self.fault = f"the file of its events has a line of more than {MOST_BYTES} bytes"
        return events

    def _checked(self, line: bytes, number: int) -> Event | None:
        try:
            event = _EVENT.validate_json(line)
        except ValidationError:
            return None
        due = self._counts.get(event.rank, 0)
        whence = self.source_of.setdefault(event.rank, number)
        if event.token != self._token or event.count != due or whence != number:
            return None
        self._counts[event.rank] = due + 1
        return event
