"""Run a worker process, in which untrusted code runs: it measures the jobs that its supervisor gives it, one by one.

    python -m moebench.measure.worker --jobs FILE --events FILE [--device cpu|cuda|cuda:N]
    torchrun --nproc-per-node RANKS -m moebench.measure.worker …

A job of several ranks needs as many processes, on one machine or on several (`torchrun --nnodes`).

The jobs file has a `WorkList` in its first line. Then it has one `Job` per line, as the supervisor hands them out.
The worker appends events to the events file, one JSON object per line:

* `ready`, with the environment
* `start`, with a job's number, before the worker begins the job
* `trial`, with the trial that a job of `moebench parity` begins
* `record`, with a job's number and record, when the job has ended
* `refused`, instead of all other events, if the user asked for a backend or a device that does not exist

After a failed job, the worker goes on if it is healthy (moebench.measure.canary). It ends after a backend that changed
its process (moebench.measure.state) or replaced a clock (moebench.measure.clock). It ends when its standard input ends,
so that it does not outlive a supervisor that was killed.
"""

import gc

gc.disable()  # what is imported stays, so that collecting garbage would only make the start longer

import argparse
import faulthandler
import json
import os
import platform
import re
import signal
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import experts
from experts import RegistryError
from moebench.machine import environment
from moebench.machine.environment import Environment
from moebench.measure import canary, clock
from moebench.measure.cache import Workload
from moebench.measure.job import measure_job
from moebench.measure.protocol import TEXT_CHARS, Events, WorkList, read_jobs, told
from moebench.measure.state import torch_settings
from moebench.measure.state.process import State
from moebench.measure.subject import Measured
from moebench.measure.timing import TimingPolicy
from moebench.results.record import Record, Status, record
from moebench.workload.backends import is_built_in, reserves_rows
from moebench.workload.case import Job
from moebench.workload.driven import check_name, destroy_buffers
from moebench.workload.ranks import Ranks, join, leave, someone_is_gone
from moebench.workload.spec import Policy

gc.enable()

#: The message of torch's CPU allocator when the host has no memory left. The error is a plain RuntimeError.
HOST_OOM = "DefaultCPUAllocator: can't allocate memory"
#: The flags of a job that left settings of torch changed, or other things of its process.
CHANGED_SETTINGS, CHANGED_PROCESS = "changed_settings", "changed_process"


def timing_policy(policy: Policy, device: torch.device) -> TimingPolicy:
    """Return the sweep's timing policy. The device's defaults replace values that the sweep does not set."""
    default = TimingPolicy.default(device)
    return TimingPolicy(
        interval_target=policy.interval_target or default.interval_target,
        time_cap_s=policy.time_cap_s or default.time_cap_s,
        cold_l2=policy.l2 == "cold",
    )


def run_job(job: Job, workload: Workload, policy: TimingPolicy) -> Measured:
    """Measure one job. Any exception becomes the job's status: this is the only broad `except` of the worker."""
    try:
        return measure_job(job, workload, policy)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"status": Status.oom, "detail": _briefly(error)}
    except Exception as error:
        reason = _reason(error)
        if HOST_OOM in reason:
            return {"status": Status.oom, "detail": _briefly(error)}
        return {"status": Status.error, "detail": _account(error, reason)}


def _reason(error: Exception) -> str:
    """Return the type and text of an error, even if the error's `__str__` raises."""
    parts = traceback.format_exception_only(error)  # a SyntaxError begins with its place in the source, indented
    return next((part for part in parts if part[:1].strip()), type(error).__name__).strip()


def _account(error: Exception, reason: str) -> str:
    """Return the reason and the traceback of an error. A long text of the error is there once, and in part."""
    whole = traceback.format_exc(limit=-8)
    if len(whole) > TEXT_CHARS:
        whole = "Traceback (most recent call last):\n" + "".join(traceback.format_tb(error.__traceback__, limit=-8))
        reason = told(reason, TEXT_CHARS // 4)
    return told(f"{reason}\n{whole}")


def _briefly(error: BaseException) -> str:
    """Return the first two sentences of an error's message. In torch's messages, advice follows."""
    lines = (line for line in told(error).splitlines() if line.strip())
    return ". ".join(next(lines, type(error).__name__).split(". ")[:2])


def work(work_list: WorkList, events: Events, device: torch.device, jobs: Iterable[Job] | None = None) -> None:
    """Measure `jobs`, or the work list's own jobs if `jobs` is None, and emit the events of each job.

    All ranks measure. The first rank emits the events, and a rank emits the record of a job that failed on it.
    """
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
    ranks = join(
        device, 2 * work_list.policy.timeout_s, work_list.dp_size
    )  # the supervisor ends ranks that wait for one that hangs
    _measure_all(jobs, work_list, events, Workload(device, ranks), described)
    leave(ranks)


def _measure_all(
    jobs: Iterable[Job], work_list: WorkList, events: Events, workload: Workload, described: Environment
) -> None:
    ranks, policy = workload.ranks, timing_policy(work_list.policy, workload.device)
    processes = ranks.tell((platform.node(), os.getpid()))
    described = environment.together(ranks.tell(described)[:: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))])
    for number, job in enumerate(jobs):
        if ranks.rank == 0:
            events.emit("start", number=number)
            workload.tell = lambda trial: events.emit("trial", trial=trial)
        row = _row(job, workload, policy, work_list, described)
        failed = row.status in (Status.oom, Status.error)
        while failed and someone_is_gone(processes):  # that rank wrote the record or died: this is only a consequence
            signal.pause()  # the launcher ends this rank, and its log says how that rank ended
        if ranks.rank == 0 or failed:
            events.emit("record", number=number, record=json.loads(row.to_json()))
        if not failed and reserves_rows(job.dispatcher):
            destroy_buffers(job.dispatcher)  # every job takes the memory that it needs, so its columns count it
        if failed:
            if ranks.size > 1:  # the other ranks wait for this one in a collective: only a new group can go on
                os._exit(1)
            _recover(workload)  # raises if an error broke the process or its GPU: another worker goes on
        if changed := [flag for flag in (CHANGED_SETTINGS, CHANGED_PROCESS) if flag in row.flags]:
            raise canary.Unhealthy(f"{job.backend} has left its process changed ({changed[0]}): another worker goes on")
        if (replaced := clock.replaced()) and not work_list.are_checks:  # a check's worker has no other backend
            raise canary.Unhealthy(f"{job.backend} has replaced {', '.join(replaced)}: another worker goes on")


def _row(job: Job, workload: Workload, policy: TimingPolicy, work_list: WorkList, described: Environment) -> Record:
    started, settings = clock.perf_counter(), torch_settings.settings()
    state = None if is_built_in(job.backend) or work_list.are_checks else State()
    workload.trace = _trace_file(job, work_list, workload.ranks)
    measured = run_job(job, workload, policy)
    device, rank = workload.device, workload.ranks.rank
    if workload.ranks.size > 1 and measured["status"] in (Status.oom, Status.error):
        measured["detail"] = f"rank {rank}: {measured['detail']}"
    measured |= {"device": device.type, "job_s": clock.perf_counter() - started, "round": work_list.round}
    measured["gpu"] = described.gpus[0].name if described.gpus else None
    measured["gpu_uuid"] = described.gpu_uuids(workload.ranks.size)
    if not work_list.are_checks:  # a check's worker has no other backend
        of_torch = torch_settings.changed_settings(settings)
        _tell_changes(measured, of_torch, () if state is None else state.changes(), workload.ranks)
    if "samples_ms" in measured:
        measured["sample_rounds"] = (work_list.round,) * len(measured["samples_ms"])
    if measured.get("busy_samples_ms"):
        measured["busy_sample_rounds"] = (work_list.round,) * len(measured["busy_samples_ms"])
    ids: dict[str, Any] = {"run_id": work_list.run_id, "env_id": described.env_id}
    if measured.get("executed") is not None:
        measured["executed"] = told(measured["executed"])
    try:
        return record(job, **ids, **measured)
    except ValidationError as error:
        kept = {name: measured[name] for name in ("device", "job_s", "round", "gpu", "gpu_uuid")}
        detail = told(f"what was measured is not a row of results: {error}")
        return record(job, Status.error, detail=detail, **ids, **kept)


def _tell_changes(measured: Measured, of_torch: tuple[str, ...], of_process: tuple[str, ...], ranks: Ranks) -> None:
    """Add flags, and to `detail` what any rank has changed. A rank that failed asks no other rank."""
    mine = {CHANGED_SETTINGS: of_torch, CHANGED_PROCESS: of_process}
    by_rank = [mine] if measured["status"] in (Status.oom, Status.error) else ranks.tell(mine)
    found = {flag: tuple(dict.fromkeys(one for rank in by_rank for one in rank[flag])) for flag in mine}
    measured["flags"] = (*measured.get("flags", ()), *(flag for flag, changes in found.items() if changes))
    words = ", ".join(one for changes in found.values() for one in changes)
    if words:
        lines = [measured.get("detail"), f"the backend left changed: {told(words)}"]
        measured["detail"] = "\n".join(line for line in lines if line)


def _trace_file(job: Job, work_list: WorkList, ranks: Ranks) -> Path | None:
    if work_list.traces is None:
        return None
    parts = [job.case.case_id, job.backend, job.dispatcher]
    parts += [f"round{work_list.round}"] * (work_list.round > 0) + [f"rank{ranks.rank}"] * (ranks.size > 1)
    return work_list.traces / (re.sub(r"[^\w.+-]", "_", "--".join(parts), flags=re.ASCII) + ".json")


def _tell_unsupported(work_list: WorkList, jobs: Iterable[Job], events: Events, env_id: str) -> None:
    for number, job in enumerate(jobs):
        if os.environ["RANK"] != "0":
            continue
        events.emit("start", number=number)
        dp = f", dp_size = {job.case.dp_size}" if job.case.dp_size > 1 else ""
        has = f"this run has {torch.cuda.device_count()}"
        detail = f"ep_size = {job.case.ep_size}{dp} needs one GPU per rank, {has}"
        ids: dict[str, Any] = {"run_id": work_list.run_id, "env_id": env_id, "round": work_list.round}
        row = record(job, Status.unsupported, detail=detail, device="cuda", **ids)
        events.emit("record", number=number, record=json.loads(row.to_json()))


def _recover(workload: Workload) -> None:
    """Free the memory of a failed job, and check that the process still computes right. Raises Unhealthy if not."""
    workload.forget()
    if workload.device.type == "cuda":
        clock.synchronize(workload.device)
        torch.cuda.empty_cache()
    canary.sing(workload.device)


def _other_experts(folder: Path | None) -> list[str]:
    """Return a mistake if `experts` must come from `folder` and Python imported it from another place."""
    assert experts.__file__ is not None
    found = Path(experts.__file__).resolve().parent
    if folder is None or found == folder.resolve() / "experts":
        return []
    return [f"experts was imported from {found}, and not from {folder}: check that it has an experts package"]


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
        while os.read(0, 1):  # not sys.stdin: if a thread holds its lock, the interpreter aborts at its end
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def pick_device(name: str | None) -> torch.device:
    """Return the named device; without a name, this rank's GPU if torch has a GPU, else the CPU."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", "0")))
    return device


def main() -> None:
    """Run the worker as its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--device")
    options = parser.parse_args()
    faulthandler.enable()
    gc.freeze()  # imported objects stay: collections, one before each memory measurement, can skip them
    _end_with_supervisor()
    work_list, jobs = read_jobs(options.jobs)
    if "OMP_NUM_THREADS" not in os.environ:  # checks are so small that threads would only wait for one another
        torch.set_num_threads(1 if work_list.are_checks else environment.cpu_cores_usable())
    try:
        work(work_list, Events(options.events), pick_device(options.device), jobs)
    except Exception:
        traceback.print_exc()
        os._exit(1)  # with a broken GPU, the interpreter may hang in its own shutdown


if __name__ == "__main__":
    main()
