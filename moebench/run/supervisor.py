"""Supervise one worker process, or one group of ranks: give it jobs, read its records, notice if it dies or hangs.

A backend runs in the worker. The supervisor keeps the worker's files by descriptor, and believes only what it can
check: a record must be about the job that the worker was given last.
"""

import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from moebench.errors import Refused, RunnerError
from moebench.machine.environment import Environment
from moebench.measure.protocol import (
    LISTING_CHARS,
    TEXT_CHARS,
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
from moebench.run.workers.group import Files, Place, Work
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
    true once the worker can take no more jobs. `lost` says why the worker's machine cannot be reached any more; it is
    empty as long as it can. `end` ends the worker and all processes that it started.
    """

    def __init__(self, plan: Plan, place: Place, processes: Processes) -> None:
        self._plan, self._node = plan, place.node
        self._num_ranks, self._dp_size = processes
        self.environment: Environment | None = None
        self.over = False
        self.lost = ""
        self._given: list[Job] = []
        self._num_done = 0
        self._running: int | None = None  # number of the job that the worker is measuring
        self._trial: str | None = None  # the trial that the job is playing
        self._weights: Weights | None = None
        self._kills_before = 0
        token = secrets.token_hex(16)
        files = Files.unused(plan.folder.resolve() / "logs")
        self._log = files.log
        folder = plan.experts_folder
        work = Work(
            program=sys.executable,
            head=self._head(),
            num_ranks=self._num_ranks,
            token=token,
            device=plan.device,
            variables=importing_from(folder) if folder is not None else {},
        )
        self._group = place.start(work, files)
        self._events = EventReader(self._group.sources, token)
        self._since = time.monotonic()

    def _head(self) -> str:
        plan = self._plan
        return WorkList(
            run_id=plan.run_id,
            policy=plan.policy,
            backends=plan.backends,
            are_checks=plan.are_checks,
            round=plan.round,
            dp_size=self._dp_size,
            experts_folder=plan.experts_folder and plan.experts_folder.resolve(),
            traces=plan.folder.resolve() / "traces" if plan.profile else None,
        ).model_dump_json()

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
    def job(self) -> Job | None:
        """The job that the worker is measuring; None between two jobs."""
        return None if self._running is None else self._given[self._running]

    def give(self, jobs: Sequence[Job]) -> None:
        """Add jobs, which the worker measures next."""
        self._given += jobs
        self._kills_before = self._group.kernel_kills()
        self._group.write_jobs(job.model_dump_json() for job in jobs)
        self._since = time.monotonic()
        self._weights = self._given[-1].case.weights if self._given else None

    def watch(self, enough: Callable[[], bool]) -> Iterator[Record]:
        """Yield the records that the worker reported since the last call, and a record for a job that died or hung.

        The worker is over after a death, a hang or an event that cannot be believed, if its machine is lost, and when
        `enough` returns true after a record. Raises Refused where the worker refused its jobs. Raises RunnerError where
        the worker ended or hung before it measured anything.
        """
        # checked first, so that the last lines of a process that has ended are still read
        code = self._group.code()
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
        elif code is not None:
            yield from self._died(code)
        elif self._group.lost:
            self.over, self.lost = True, self._group.lost
        elif self._group.a_rank_has_left():
            detail = f"a rank ended, as if all were well, before the group's work was done\n{self._group.tail()}"
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
                    self._group.follow_ranks()
            case Tries() if self._running is not None:
                self._trial = event.trial
            case Recorded(number=number) if number == self._running:
                row = self._believed(event.record)
                if self._is_broken_by(row) and self._group.died_elsewhere(self._events.source_of[event.rank]):
                    return None  # a consequence: what died elsewhere tells of itself
                self._end_of_job()
                return row
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
        most = {"detail": TEXT_CHARS if job.check is None else LISTING_CHARS, "executed": TEXT_CHARS}
        texts = {name: told(getattr(row, name), chars) for name, chars in most.items() if getattr(row, name)}
        return row.model_copy(update=texts | {"node": self._node})

    def _end_of_job(self) -> None:
        self._running = None
        self._num_done += 1
        self._kills_before = self._group.kernel_kills()

    def _is_broken_by(self, row: Record) -> bool:
        """Whether a rank of a group failed. The other ranks would wait for it forever, so the whole group must end."""
        return self._num_ranks > 1 and row.status in (Status.oom, Status.error)

    def _is_late(self) -> bool:
        if self._running is None and self.environment is not None and not self.unfinished:
            return False  # it waits for jobs
        limit = START_TIMEOUT_S if self._running is None else self._plan.policy.timeout_s
        return time.monotonic() - self._since > limit

    def _died(self, code: int) -> Iterator[Record]:
        """Yield the record of the job that died. A death between two jobs yields no record."""
        scratch = self._log.with_suffix(".disk")
        with suppress(FileNotFoundError):  # a backend may have removed the folder
            write_atomically(scratch, bytes(1 << 16))  # raises where the disk is full, which also ends workers
            scratch.unlink()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        last_words = self._group.tail()
        killed = code == -signal.SIGKILL or "SIGKILL" in last_words
        if killed and self._group.kernel_kills() > self._kills_before:
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
        self._group.kill()
        was_ready = self.environment is not None and not self._num_done
        if self._running is None and was_ready and any(map(own_backend, self.unfinished)):
            self._running = 0
        if self._running is not None:
            yield self._end_job(status, detail)
        elif not self._num_done:
            told_last = f"a worker ended before it measured anything: {detail}".splitlines()
            raise RunnerError(*told_last, f"log: {self._log}")

    def blamed(self, detail: str) -> Record:
        """Return the record of a crash for the first job that is not finished. No other worker gets the job."""
        self._running = self._num_done
        return self._end_job(Status.crash, detail)

    def _end_job(self, status: Status, detail: str) -> Record:
        """Return the record of the job that the worker was measuring."""
        assert self._running is not None
        assert self.environment is not None, "a job starts after the worker has reported its environment"
        job = self._given[self._running]
        self._end_of_job()
        if self._trial is not None:
            detail = f"{detail}\n{command(job, self._trial)}"
        return record(
            job,
            status,
            detail=detail,
            device=self.environment.device.partition(":")[0],
            gpu=self.environment.gpus[0].name if self.environment.gpus else None,
            gpu_uuid=self.environment.gpu_uuids(self._num_ranks),
            node=self._node,
            round=self._plan.round,
            run_id=self._plan.run_id,
            env_id=self.environment.env_id,
        )

    def end(self) -> None:
        self._group.kill()
        self._group.close()
