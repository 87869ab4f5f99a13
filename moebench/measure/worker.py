"""Where untrusted code runs: a process that measures a list of jobs, one after the other, under a supervisor.

    python -m moebench.measure.worker --jobs FILE --events FILE [--device cpu|cuda|cuda:N]
    torchrun --nproc-per-node EP_SIZE -m moebench.measure.worker …

Jobs of an EP size above 1 are measured by as many ranks, of one machine or of several (`torchrun --nnodes`).
The jobs file is a `WorkList`, then a `Job` a line, as the supervisor hands them out. Events are appended to the events
file, one JSON object a line: `ready` with the environment, `start` with a job's number before it is touched, `record`
when it ended; or `refused`, alone, where the user asked for a backend or a device that is not there. A process in which
a job failed goes on if it is healthy (moebench.measure.canary). It ends when its standard input does, so that it does
not outlive a supervisor that was killed.
"""

import argparse
import faulthandler
import gc
import json
import os
import platform
import re
import signal
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import experts
from experts.errors import RegistryError
from experts.registry import check_name
from moebench.machine import environment
from moebench.machine.environment import Environment
from moebench.measure import canary
from moebench.measure.cache import Workload
from moebench.measure.job import measure_job
from moebench.measure.protocol import Events, WorkList, read_jobs
from moebench.measure.subject import Measured
from moebench.measure.timing import TimingPolicy
from moebench.results.record import Record, Status, record
from moebench.workload.case import Job
from moebench.workload.ranks import Ranks, join, leave, someone_is_gone
from moebench.workload.spec import Policy

#: What torch's CPU allocator says when the host has no memory left; it raises a plain RuntimeError.
HOST_OOM = "DefaultCPUAllocator: can't allocate memory"
#: Flag of a job that left torch's settings otherwise than it found them.
CHANGED_SETTINGS = "changed_settings"


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
        return measure_job(job, workload, policy)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"status": Status.oom, "detail": _briefly(error)}
    except Exception as error:
        reason = _reason(error)
        if HOST_OOM in reason:
            return {"status": Status.oom, "detail": _briefly(error)}
        detail = f"{reason}\n{traceback.format_exc(limit=-8)}"
        return {"status": Status.error, "detail": detail.encode(errors="backslashreplace").decode()}


def _reason(error: Exception) -> str:
    """Type and text of an error, also where its text cannot be made."""
    parts = traceback.format_exception_only(error)  # a SyntaxError's begin with its place, indented
    return next(part for part in parts if not part.startswith(" ")).strip()


def _briefly(error: BaseException) -> str:
    """The first two sentences: torch's message goes on with advice."""
    return ". ".join((str(error) or type(error).__name__).splitlines()[0].split(". ")[:2])


def work(work_list: WorkList, events: Events, device: torch.device, jobs: Iterable[Job] | None = None) -> None:
    """Measure the jobs, the list's own if there are no others, and tell of each. All ranks measure, the first tells."""
    jobs = work_list.jobs if jobs is None else jobs
    named = dict.fromkeys([*(job.backend for job in work_list.jobs), *work_list.backends])
    mistakes = [*_other_experts(work_list.experts_folder), *_unknown_backends(named)]
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        described = environment.collect(device.type if num_ranks > 1 else str(device))
    except ValueError as absent:
        mistakes.append(str(absent))
    if mistakes:
        events.emit("refused", mistakes=mistakes)
        return
    if os.environ.get("RANK", "0") == "0":
        events.emit("ready", environment=described.model_dump(mode="json"))
    if device.type == "cuda":
        too_few = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
        if too_few:
            _tell_unsupported(work_list, jobs, events, described.env_id)
            return
        torch.cuda.set_device(device)
    ranks = join(device, 2 * work_list.policy.timeout_s)  # who waits for a rank that hangs is ended by the supervisor
    _measure_all(jobs, work_list, events, Workload(device, ranks), described)
    leave(ranks)


def _measure_all(
    jobs: Iterable[Job], work_list: WorkList, events: Events, workload: Workload, described: Environment
) -> None:
    ranks, policy = workload.ranks, timing_policy(work_list.policy, workload.device)
    processes = ranks.tell((platform.node(), os.getpid()))
    for number, job in enumerate(jobs):
        if ranks.rank == 0:
            events.emit("start", number=number)
        row = _row(job, workload, policy, work_list, described)
        failed = row.status in (Status.oom, Status.error)
        while failed and someone_is_gone(processes):  # it has told why, or died: this rank only misses it
            signal.pause()  # the launcher ends this rank too, and its log says how the first ended
        if ranks.rank == 0 or failed:
            events.emit("record", number=number, record=json.loads(row.to_json()))
        if failed:
            if ranks.size > 1:  # the other ranks wait in a collective for this one: only a new group goes on
                os._exit(1)
            _recover(workload)  # raises where an error broke the process or its GPU: another worker goes on
        if CHANGED_SETTINGS in row.flags:
            raise canary.Unhealthy(f"{job.backend} has changed settings of torch: another worker goes on")


def _row(job: Job, workload: Workload, policy: TimingPolicy, work_list: WorkList, described: Environment) -> Record:
    started, settings = time.perf_counter(), canary.settings()
    workload.trace = _trace_file(job, work_list, workload.ranks)
    measured = run_job(job, workload, policy)
    device, rank = workload.device, workload.ranks.rank
    if workload.ranks.size > 1 and measured["status"] in (Status.oom, Status.error):
        measured["detail"] = f"rank {rank}: {measured['detail']}"
    measured |= {"device": device.type, "job_s": time.perf_counter() - started, "round": work_list.round}
    measured["gpu"] = described.gpus[0].name if described.gpus else None
    measured["gpu_uuid"] = described.gpu_uuids(workload.ranks.size)
    if canary.settings() != settings and not work_list.are_checks:  # a check's worker has no other backend
        measured["flags"] = (*measured.get("flags", ()), CHANGED_SETTINGS)
    if "samples_ms" in measured:
        measured["sample_rounds"] = (work_list.round,) * len(measured["samples_ms"])
    return record(job, run_id=work_list.run_id, env_id=described.env_id, **measured)


def _trace_file(job: Job, work_list: WorkList, ranks: Ranks) -> Path | None:
    if work_list.traces is None:
        return None
    parts = [job.case.case_id, job.backend, job.dispatcher]
    parts += [f"round{work_list.round}"] * (work_list.round > 0) + [f"rank{ranks.rank}"] * (ranks.size > 1)
    return work_list.traces / (re.sub(r"[^\w.+-]", "_", "--".join(parts)) + ".json")


def _tell_unsupported(work_list: WorkList, jobs: Iterable[Job], events: Events, env_id: str) -> None:
    for number, job in enumerate(jobs):
        if os.environ["RANK"] != "0":
            continue
        events.emit("start", number=number)
        detail = f"ep_size = {job.case.ep_size} needs as many GPUs, this run has {torch.cuda.device_count()}"
        ids: dict[str, Any] = {"run_id": work_list.run_id, "env_id": env_id, "round": work_list.round}
        row = record(job, Status.unsupported, detail=detail, device="cuda", **ids)
        events.emit("record", number=number, record=json.loads(row.to_json()))


def _recover(workload: Workload) -> None:
    """After a failed job: free what it left, and see whether a right result still comes out right."""
    workload.forget()
    if workload.device.type == "cuda":
        torch.cuda.synchronize(workload.device)
        torch.cuda.empty_cache()
    canary.sing(workload.device)


def _other_experts(folder: Path | None) -> list[str]:
    """What is wrong where backends are to come from `folder` and Python found `experts` in another place."""
    assert experts.__file__ is not None
    found = Path(experts.__file__).resolve().parent
    if folder is None or found == folder.resolve() / "experts":
        return []
    return [f"experts was imported from {found}, and not from {folder}: is there an experts package in it?"]


def _unknown_backends(names: Iterable[str]) -> list[str]:
    mistakes = []
    for name in names:
        try:
            check_name(name)
        except RegistryError as error:
            mistakes.append(str(error))
    return mistakes


def _end_with_supervisor() -> None:
    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: held by a thread, its lock aborts the interpreter's shutdown
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def pick_device(name: str | None) -> torch.device:
    """The named device; without a name a GPU if torch has one, this rank's among ranks, and the CPU otherwise."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", "0")))
    return device


def main() -> None:
    """Run as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--device")
    options = parser.parse_args()
    faulthandler.enable()
    gc.freeze()  # what is imported by now stays: collections, one before each weighing, need not look at it
    _end_with_supervisor()
    work_list, jobs = read_jobs(options.jobs)
    if "OMP_NUM_THREADS" not in os.environ:  # checks are so small that threads would only wait for each other
        torch.set_num_threads(1 if work_list.are_checks else environment.cpu_cores_usable())
    try:
        work(work_list, Events(options.events), pick_device(options.device), jobs)
    except Exception:
        traceback.print_exc()
        os._exit(1)  # with a broken GPU the interpreter may hang over its own end


if __name__ == "__main__":
    main()
