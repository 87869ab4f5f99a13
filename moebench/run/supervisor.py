"""Supervise one worker process, or one group of ranks: give it jobs, read its records, notice if it dies or hangs."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from moebench.errors import Refused, RunnerError
from moebench.machine import gpus
from moebench.machine.environment import Environment, cpu_cores_usable
from moebench.machine.gpus import Place
from moebench.measure.protocol import WorkList
from moebench.parity.checks import command
from moebench.results.files import write_atomically
from moebench.results.record import Record, Status, record
from moebench.run.plan import Plan, importing_from
from moebench.workload.case import Job, Weights

#: A worker that has not reported `ready` within this time counts as failed: importing torch and opening a GPU take
#: seconds.
START_TIMEOUT_S = 180.0
#: A killed process that is still there after this time is stuck in its GPU's driver, and nobody can end it.
KILL_TIMEOUT_S = 30.0
LOG_LINES, TAIL_BYTES = 12, 1 << 16
#: The file in which the kernel counts the processes that it killed for lack of memory.
KERNEL_COUNTERS = Path("/proc/vmstat")


class WorkerProcess:
    """A worker at a place, with one process for each rank of its jobs. `give` adds jobs while the worker runs.

    `environment` is the environment that the worker reported; it is None until the worker has reported it. `over` is
    true once the worker can take no more jobs. `end` ends the worker and all processes that it started.
    """

    def __init__(self, plan: Plan, place: Place, num_ranks: int, at_once: int) -> None:
        self._plan, self._place, self._num_ranks, self._at_once = plan, place, num_ranks, at_once
        self.environment: Environment | None = None
        self.over = False
        self._given: list[Job] = []
        self._num_done = 0
        self._running: int | None = None  # number of the job that the worker is measuring
        self._trial: str | None = None  # the trial that the job is playing
        self._kills_before = 0
        self._torn = b""
        name = _unused_name(plan.folder / "logs")
        self._log, self._job_file, events = (
            plan.folder / "logs" / f"{name}{ending}" for ending in (".log", ".jobs.jsonl", ".events.jsonl")
        )
        self._write_head()
        events.touch()
        self._events = events.open("rb")
        self._process = self._start(events)
        self._since = time.monotonic()

    def _write_head(self) -> None:
        plan = self._plan
        head = WorkList(
            run_id=plan.run_id,
            policy=plan.policy,
            backends=tuple(dict.fromkeys(job.backend for job in plan.jobs)),
            are_checks=any(job.check for job in plan.jobs),
            round=plan.round,
            experts_folder=plan.experts_folder and plan.experts_folder.resolve(),
            traces=plan.folder / "traces" if plan.profile else None,
        )
        self._job_file.write_text(head.model_dump_json() + "\n", encoding="utf-8")

    def _start(self, events: Path) -> subprocess.Popen[bytes]:
        """Start the worker's module in Python, or for several ranks through torch.distributed's launcher."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._num_ranks}"]
        arguments = [sys.executable, *(launcher if self._num_ranks > 1 else []), "-m", "moebench.measure.worker"]
        arguments += ["--jobs", str(self._job_file), "--events", str(events)]
        arguments += ["--device", self._plan.device] if self._plan.device else []
        with self._log.open("wb") as log:
            # in its own session, so that Ctrl-C reaches only the supervisor, and a hung group can be killed as a whole
            return subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._variables(),
            )

    def _variables(self) -> dict[str, str]:
        variables = os.environ | gpus.variables(self._place, self._at_once, self._num_ranks, cpu_cores_usable())
        folder = self._plan.experts_folder
        return variables | (importing_from(folder) if folder is not None else {})

    @property
    def unfinished(self) -> Sequence[Job]:
        """The jobs that the worker was given and has not finished."""
        return self._given[self._num_done :]

    @property
    def weights(self) -> Weights | None:
        """The weights of the last case that the worker was given; None before it was given any."""
        return self._given[-1].case.weights if self._given else None

    @property
    def at_a_job(self) -> bool:
        return self._running is not None

    def give(self, jobs: Sequence[Job]) -> None:
        """Add jobs, which the worker measures next."""
        self._given += jobs
        self._kills_before = _kernel_kills()
        with self._job_file.open("a", encoding="utf-8") as file:
            file.writelines(job.model_dump_json() + "\n" for job in jobs)
        self._since = time.monotonic()

    def watch(self, enough: Callable[[], bool]) -> Iterator[Record]:
        """Yield the records that the worker reported since the last call, and a record for a job that died or hung.

        The worker is over after a death or a hang, and when `enough` returns true after a record. Raises Refused where
        the worker refused its jobs. Raises RunnerError where the worker ended or hung before it measured anything.
        """
        ended = (
            self._process.poll() is not None
        )  # checked first, so that the last lines of a process that has ended are still read
        *lines, self._torn = (self._torn + self._events.read()).split(b"\n")
        for line in lines:
            self._since = time.monotonic()
            row = self._hear(json.loads(line))
            if row is not None:
                yield row
                if enough() or self._is_broken_by(row):
                    self.over = True
                    return
        if ended:
            self.over = True
            yield from self._died()
        elif not lines and self._is_late():
            self.over = True
            yield from self._hung()

    def _hear(self, event: dict[str, Any]) -> Record | None:
        match event["kind"]:
            case "ready":
                self.environment = Environment.model_validate(event["environment"])
            case "refused":
                raise Refused("\n".join(event["mistakes"]))
            case "start":
                self._running, self._trial = event["number"], None
            case "trial":
                self._trial = event["trial"]
            case "record" if (
                event["number"] == self._running
            ):  # where several ranks fail, only the first one's record counts
                self._running = None
                self._num_done += 1
                self._kills_before = _kernel_kills()
                return Record.model_validate_json(json.dumps(event["record"]))
        return None

    def _is_broken_by(self, row: Record) -> bool:
        """Whether a rank of a group failed. The other ranks would wait for it forever, so the whole group must end."""
        return self._num_ranks > 1 and row.status in (Status.oom, Status.error)

    def _is_late(self) -> bool:
        if self._running is None and self.environment is not None and not self.unfinished:
            return False  # it waits for jobs
        limit = START_TIMEOUT_S if self._running is None else self._plan.policy.timeout_s
        return time.monotonic() - self._since > limit

    def _died(self) -> Iterator[Record]:
        """Yield the record of the job that died. A death between two jobs yields no record."""
        if self._running is None and self._num_done:
            return
        write_atomically(
            self._log.with_suffix(".disk"), bytes(1 << 16)
        )  # raises where the disk is full, which also ends workers
        self._log.with_suffix(".disk").unlink()
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        if self._running is None:
            raise RunnerError(f"a worker {how} before it measured anything; {self._tail()}\nlog: {self._log}")
        tail = self._tail()
        killed = code == -signal.SIGKILL or "SIGKILL" in tail
        if killed and _kernel_kills() > self._kills_before:
            yield self._end_job(
                Status.oom, f"its process {how}; the kernel killed a process for lack of memory\n{tail}"
            )
            return
        from_outside = (
            "; another process killed it, not the kernel for lack of memory" if code == -signal.SIGKILL else ""
        )
        yield self._end_job(Status.crash, f"its process {how}{from_outside}\n{tail}")

    def _hung(self) -> Iterator[Record]:
        self._kill()
        if self._running is not None:
            limit = self._plan.policy.timeout_s
            yield self._end_job(
                Status.timeout, f"no result after {limit:g} s (policy timeout_s); the worker was killed"
            )
        elif not self._num_done:
            raise RunnerError(f"a worker did not start within {START_TIMEOUT_S:g} s\nlog: {self._log}")

    def _end_job(self, status: Status, detail: str) -> Record:
        """Return the record of the job that the worker was measuring."""
        assert self._running is not None
        assert self.environment is not None, "a job starts after the worker has reported its environment"
        job, self._running = self._given[self._running], None
        self._num_done += 1
        if self._trial is not None:
            detail = f"{detail}\n{command(job, self._trial)}"
        return record(
            job,
            status,
            detail=detail,
            device=self.environment.device.partition(":")[0],
            gpu=self.environment.gpus[0].name if self.environment.gpus else None,
            gpu_uuid=self.environment.gpu_uuids(self._num_ranks),
            round=self._plan.round,
            run_id=self._plan.run_id,
            env_id=self.environment.env_id,
        )

    def _tail(self) -> str:
        """Return the log's last lines. Where Python died with a stack, return the first lines of the thread that died.

        The most recent call is the first in such a stack. Python prints other threads before the one that died.
        """
        with self._log.open("rb") as log:  # a backend may have printed for hours
            log.seek(max(0, self._log.stat().st_size - TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        deaths = [number for number, line in enumerate(lines) if line.startswith("Fatal Python error")]
        if not deaths:
            return "\n".join(lines[-LOG_LINES:])
        death, *stacks = lines[deaths[-1] :]
        dying = [number for number, line in enumerate(stacks) if line.startswith("Current thread")]
        return "\n".join([death, *stacks[dying[0] if dying else 0 :]][:LOG_LINES])

    def end(self) -> None:
        self._kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._events.close()

    def _kill(self) -> None:
        with suppress(psutil.NoSuchProcess):  # a launcher's ranks have their own sessions
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        with suppress(ProcessLookupError):  # the group outlives its leader where the leader left children
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_TIMEOUT_S)


def _unused_name(logs: Path) -> str:
    """Return a worker's name that has no files in the folder yet.

    The files of an earlier worker hold jobs and events that must not be read again.
    """
    names = (f"worker-{number}" for number in itertools.count())
    return next(name for name in names if not any(logs.glob(f"{name}.*")))


def _kernel_kills() -> int:
    """Return how many processes the kernel has killed on this machine for lack of memory; 0 where it does not count."""
    if not KERNEL_COUNTERS.exists():
        return 0
    counters = dict(line.split() for line in KERNEL_COUNTERS.read_text().splitlines())
    return int(counters.get("oom_kill", 0))
