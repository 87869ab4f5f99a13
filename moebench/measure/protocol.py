"""What a supervisor and its worker tell each other, by two files: jobs one way, events the other. No torch here."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict

from moebench.workload.case import Job
from moebench.workload.spec import Policy

#: How often a worker looks for its next job.
TAIL_POLL_S = 0.005
#: How often a job runs before it is judged, and all must be right: a buffer is often clean by chance the first time.
PASSES = 2


class WorkList(BaseModel):
    """What a worker is asked to measure, and of which round. `experts_folder` is where `experts` must come from.

    Without `jobs` they come later, of these `backends`, all of them checks or none. `traces` is the folder where each
    leaves a profiler's trace.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    policy: Policy
    jobs: tuple[Job, ...] = ()
    backends: tuple[str, ...] = ()
    are_checks: bool = False
    round: int = 0
    experts_folder: Path | None = None
    traces: Path | None = None


def read_jobs(path: Path) -> tuple[WorkList, Iterator[Job]]:
    """The work list in the file's first line, and its jobs: those in it or else, as they are added, those below it."""
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
    """The events file, written line by line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def emit(self, kind: str, **fields: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
        self._file.flush()
