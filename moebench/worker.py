"""Where untrusted code runs: a process that measures a list of jobs, one after the other, under a supervisor.

    python -m moebench.worker --jobs FILE --events FILE [--device cpu|cuda|cuda:N]

The jobs file is a `WorkList`. Events are appended to the events file, one JSON object a line: `ready` with the
environment, `start` with a job's number before it is touched, `record` when it ended. The process ends when its
standard input does, so that it does not outlive a supervisor that was killed.
"""

import argparse
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from moebench import environment
from moebench.case import Job
from moebench.measure import Measured, Workload, measure
from moebench.record import Status, record
from moebench.spec import Policy
from moebench.timing import TimingPolicy

#: What torch's CPU allocator says when the host has no memory left; it raises a plain RuntimeError.
HOST_OOM = "DefaultCPUAllocator: can't allocate memory"


class WorkList(BaseModel):
    """What a worker is asked to measure."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    policy: Policy
    jobs: tuple[Job, ...]


class Events:
    """The events file, written line by line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def emit(self, kind: str, **fields: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
        self._file.flush()


def timing_policy(policy: Policy, device: torch.device) -> TimingPolicy:
    """The sweep's policy, with the device's defaults where it leaves them open."""
    default = TimingPolicy.default(device)
    return TimingPolicy(
        interval_target=policy.interval_target or default.interval_target,
        time_cap_s=policy.time_cap_s or default.time_cap_s,
        cold_l2=policy.l2 == "cold",
    )


def run_job(job: Job, workload: Workload, policy: TimingPolicy) -> Measured:
    """Measure one job; whatever it raises becomes its status. The one broad except of the worker."""
    try:
        return measure(job, workload, policy)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"status": Status.oom, "detail": _first_line(error)}
    except Exception as error:
        if HOST_OOM in str(error):
            return {"status": Status.oom, "detail": _first_line(error)}
        return {"status": Status.error, "detail": traceback.format_exc(limit=-8)}


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def work(work_list: WorkList, events: Events, device: torch.device) -> None:
    """Measure every job of the list, and tell of each."""
    described = environment.collect(str(device))
    events.emit("ready", environment=described.model_dump(mode="json"))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    workload, policy = Workload(device), timing_policy(work_list.policy, device)
    for number, job in enumerate(work_list.jobs):
        events.emit("start", number=number)
        started = time.perf_counter()
        measured = run_job(job, workload, policy)
        measured |= {"device": device.type, "gpu": gpu, "job_s": time.perf_counter() - started}
        row = record(job, run_id=work_list.run_id, env_id=described.env_id, **measured)
        events.emit("record", number=number, record=json.loads(row.to_json()))
        if row.status in (Status.oom, Status.error) and device.type == "cuda":
            workload.forget()
            torch.cuda.empty_cache()


def _end_with_supervisor() -> None:
    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def pick_device(name: str | None) -> torch.device:
    """The named device; without a name the first GPU if torch has one, the CPU otherwise."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def main() -> None:
    """Run as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--device")
    options = parser.parse_args()
    faulthandler.enable()
    _end_with_supervisor()
    torch.set_num_threads(environment.cpu_cores_usable())
    work_list = WorkList.model_validate_json(options.jobs.read_text())
    work(work_list, Events(options.events), pick_device(options.device))


if __name__ == "__main__":
    main()
