"""Supervise one worker process, or one group of ranks: give it jobs, read its records, notice if it dies or hangs.

A backend runs in the worker. The supervisor keeps the worker's files by descriptor, and believes only what it can
check: a record must be about the job that the worker was given last.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from moebench.errors import Refused, RunnerError
from moebench.machine import gpus
from moebench.machine.environment import Environment, cpu_cores_usable
from moebench.machine.gpus import Place
from moebench.measure.protocol import (
    LISTING_CHARS,
    TEXT_CHARS,
    TOKEN,
    Event,
    EventReader,
    Mistaken,
    Ready,
    Recorded,
    Started,
    Tries,
    WorkList,
    told,
)
from moebench.parity.checks import command
from moebench.results.files import write_atomically
from moebench.results.record import Record, Status, record
from moebench.run.backlog import own_backend
from moebench.run.plan import Plan, importing_from
from moebench.run.processes import Ranks, kernel_kills, kill_all, tail, unused_name
from moebench.workload.case import CaseFields, Job, Weights
from moebench.workload.context import Processes

#: A worker that has not reported `ready` within this time counts as failed: importing torch and opening a GPU take
#: seconds.
START_TIMEOUT_S = 180.0


class _Unbelievable(Exception):
    """An event contradicts what the supervisor knows. The message says how."""


class WorkerProcess:
    """A worker at a place, with one process for each rank of its jobs. `give` adds jobs while the worker runs.

    `environment` is the environment that the worker reported; it is None until the worker has reported it. `over` is
    true once the worker can take no more jobs. `end` ends the worker and all processes that it started.
    """

    def __init__(self, plan: Plan, place: Place, processes: Processes, at_once: int) -> None:
        self._plan, self._place, self._at_once = plan, place, at_once
        self._num_ranks, self._dp_size = processes
        self.environment: Environment | None = None
        self.over = False
        self._given: list[Job] = []
        self._num_done = 0
        self._running: int | None = None  # number of the job that the worker is measuring
        self._trial: str | None = None  # the trial that the job is playing
        self._weights: Weights | None = None
        self._kills_before = 0
        self._ranks = Ranks()
        self._token = secrets.token_hex(16)
        logs = plan.folder.resolve() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        name = unused_name(logs)
        self._log, jobs, events = (logs / f"{name}{end}" for end in (".log", ".jobs.jsonl", ".events.jsonl"))
        self._job_file = jobs.open("x", encoding="utf-8")
        self._log_file = self._log.open("ab+")
        self._events = EventReader(events, self._token)
        self._write_head()
        self._process = self._start(jobs, events)
        self._since = time.monotonic()

    def _write_head(self) -> None:
        plan = self._plan
        head = WorkList(
            run_id=plan.run_id,
            policy=plan.policy,
            backends=plan.backends,
            are_checks=plan.are_checks,
            round=plan.round,
            dp_size=self._dp_size,
            experts_folder=plan.experts_folder and plan.experts_folder.resolve(),
            traces=plan.folder.resolve() / "traces" if plan.profile else None,
        )
        self._write_jobs(head.model_dump_json())

    def _write_jobs(self, *lines: str) -> None:
        self._job_file.writelines(line + "\n" for line in lines)
        self._job_file.flush()

    def _start(self, jobs: Path, events: Path) -> subprocess.Popen[bytes]:
        """Start the worker's module in Python, or for several ranks through torch.distributed's launcher."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._num_ranks}"]
        arguments = [sys.executable, *(launcher if self._num_ranks > 1 else []), "-m", "moebench.measure.worker"]
        arguments += ["--jobs", str(jobs), "--events", str(events)]
        arguments += ["--device", self._plan.device] if self._plan.device else []
        # in its own session, so that Ctrl-C reaches only the supervisor, and a hung group can be killed as a whole
        return subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=self._variables(),
        )

    def _variables(self) -> dict[str, str]:
        variables = os.environ | gpus.variables(self._place, self._at_once, self._num_ranks, cpu_cores_usable())
        folder = self._plan.experts_folder
        return variables | (importing_from(folder) if folder is not None else {}) | {TOKEN: self._token}

    @property
    def unfinished(self) -> Sequence[Job]:
        """The jobs that the worker was given and has not finished."""
        return self._given[self._num_done :]

    @property
    def weights(self) -> Weights | None:
        """The weights of the last case that the worker was given; None before it was given any."""
        return self._weights

    def may_take(self, jobs: Sequence[Job]) -> bool:
        """Whether the worker may measure these jobs. A backend that is not built in has its worker for itself."""
        return not self._given or all(own_backend(job) is None for job in (self._given[0], *jobs))

    @property
    def at_a_job(self) -> bool:
        return self._running is not None

    def give(self, jobs: Sequence[Job]) -> None:
        """Add jobs, which the worker measures next."""
        self._given += jobs
        self._kills_before = kernel_kills()
        self._write_jobs(*(job.model_dump_json() for job in jobs))
        self._since = time.monotonic()
        self._weights = self._given[-1].case.weights if self._given else None

    def watch(self, enough: Callable[[], bool]) -> Iterator[Record]:
        """Yield the records that the worker reported since the last call, and a record for a job that died or hung.

        The worker is over after a death, a hang or an event that cannot be believed, and when `enough` returns true
        after a record. Raises Refused where the worker refused its jobs. Raises RunnerError where the worker ended or
        hung before it measured anything.
        """
        # checked first, so that the last lines of a process that has ended are still read
        ended = self._process.poll() is not None
        events = self._events.read()
        for event in events:
            self._since = time.monotonic()
            try:
                row = self._hear(event)
            except _Unbelievable as reason:
                yield from self._ends(Status.crash, f"its worker {reason}; the worker was killed")
                return
            if row is not None:
                yield row
                if enough() or self._is_broken_by(row):
                    self.over = True
                    return
        if self._events.fault:
            yield from self._ends(Status.crash, f"{self._events.fault}; the worker was killed")
        elif ended:
            yield from self._died()
        elif self._ranks.have_left():
            detail = f"a rank ended, as if all were well, before the group's work was done\n{self._tail()}"
            yield from self._ends(Status.crash, detail)
        elif not events and self._is_late():
            yield from self._hung()

    def _hear(self, event: Event) -> Record | None:
        match event:
            case Ready() if self.environment is None:
                self.environment = event.environment
            case Mistaken() if self.environment is None:
                raise Refused(*map(told, event.mistakes))
            case Started(number=number) if self._running is None and number == self._num_done < len(self._given):
                self._running, self._trial = number, None
                if self._num_ranks > 1 and not number:
                    self._ranks = Ranks(self._process.pid, self._num_ranks)
            case Tries() if self._running is not None:
                self._trial = event.trial
            case Recorded(number=number) if number == self._running:
                return self._believed(event.record)
            case Recorded(number=number) if self._num_ranks > 1 and number == self._num_done - 1:
                pass  # where several ranks fail, only the first one's record counts
            case _:
                raise _Unbelievable(f"reported `{event.kind}` out of turn")
        return None

    def _believed(self, row: Record) -> Record:
        """Return the record of the running job, its texts bounded. Raises _Unbelievable if it is not this job's."""
        assert self._running is not None
        assert self.environment is not None, "a job starts after the worker has reported its environment"
        job, plan = self._given[self._running], self._plan
        same = {name: getattr(row, name) for name in CaseFields.model_fields} == dict(job.case) and row.key == job.key
        if not same or (row.run_id, row.round, row.env_id) != (plan.run_id, plan.round, self.environment.env_id):
            raise _Unbelievable("reported a record of another job")
        self._running = None
        self._num_done += 1
        self._kills_before = kernel_kills()
        most = {"detail": TEXT_CHARS if job.check is None else LISTING_CHARS, "executed": TEXT_CHARS}
        texts = {name: told(getattr(row, name), chars) for name, chars in most.items() if getattr(row, name)}
        return row.model_copy(update=texts)

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
        scratch = self._log.with_suffix(".disk")
        with suppress(FileNotFoundError):  # a backend may have removed the folder
            write_atomically(scratch, bytes(1 << 16))  # raises where the disk is full, which also ends workers
            scratch.unlink()
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        last_words = self._tail()
        killed = code == -signal.SIGKILL or "SIGKILL" in last_words
        if killed and kernel_kills() > self._kills_before:
            why = "; the kernel killed a process for lack of memory"
            yield from self._ends(Status.oom, f"its process {how}{why}\n{last_words}")
            return
        outside = "; another process killed it, not the kernel for lack of memory" if code == -signal.SIGKILL else ""
        yield from self._ends(Status.crash, f"its process {how}{outside}\n{last_words}")

    def _hung(self) -> Iterator[Record]:
        limit = START_TIMEOUT_S if self._running is None else self._plan.policy.timeout_s
        detail = f"no result after {limit:g} s (policy timeout_s); the worker was killed"
        if self.environment is None:
            detail = f"it did not start within {limit:g} s"
        yield from self._ends(Status.timeout, detail)

    def _ends(self, status: Status, detail: str) -> Iterator[Record]:
        """Kill the worker, and yield the record of the job that it was measuring.

        A worker that has measured nothing yet may not have said that it began. A backend that is not built in has its
        worker for itself, so its first job is to blame. Raises RunnerError if nobody is to blame and nothing was
        measured.
        """
        self.over = True
        self._kill()
        was_ready = self.environment is not None and not self._num_done
        if self._running is None and was_ready and any(map(own_backend, self.unfinished)):
            self._running = 0
        if self._running is not None:
            yield self._end_job(status, detail)
        elif not self._num_done:
            told_last = f"a worker ended before it measured anything: {detail}".splitlines()
            raise RunnerError(*told_last, f"log: {self._log}")

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
        return tail(self._log_file.fileno())

    def end(self) -> None:
        self._kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        for file in (self._events, self._job_file, self._log_file):
            file.close()

    def _kill(self) -> None:
        kill_all(self._process, self._token)
