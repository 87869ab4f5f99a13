"""Read and write the two files between a supervisor and its worker: the file of jobs, and the file of events."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict

from moebench.workload.case import Job
from moebench.workload.spec import Policy

#: A worker looks for its next job once per this many seconds.
TAIL_POLL_S = 0.005
#: The number of checked passes (forward and, in mode train, backward) of a job. All passes must be right. The first
#: pass is not enough, because in it a buffer is often clean by chance.
PASSES = 2


class WorkList(BaseModel):
    """The jobs that a worker must measure, and their round.

    If `jobs` is empty, the supervisor adds jobs later. `backends` are the backends of all jobs. `are_checks` is true if
    all jobs are checks, and false if no job is a check. If `experts_folder` is not None, the package `experts` must be
    imported from that folder. If `traces` is not None, each job writes a profiler trace to that folder.
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
    """The file of events; each event is one line of JSON."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def emit(self, kind: str, **fields: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
        self._file.flush()
