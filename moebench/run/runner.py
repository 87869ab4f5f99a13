"""Run the jobs of plans in worker processes, and append each record to the journal.

This module decides which job runs where, until every job is measured. Backends run in worker processes, so a backend
that breaks its process cannot break this one. Only this process writes the journal.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from moebench.errors import Refused, RunnerError
from moebench.machine.environment import Environment
from moebench.machine.gpus import places
from moebench.results.files import (
    ENVIRONMENT_NAME,
    ENVIRONMENTS_NAME,
    content_of,
    write_again,
    write_atomically,
    writing_to,
)
from moebench.results.journal import JOURNAL_NAME, Journal
from moebench.results.record import Record
from moebench.run.backlog import Backlog, parts
from moebench.run.plan import Plan, new_run_id
from moebench.run.stop import Stop
from moebench.run.supervisor import WorkerProcess
from moebench.run.workers.group import Place
from moebench.run.workers.local import LocalPlace
from moebench.workload.case import Job
from moebench.workload.context import Processes

__all__ = ["Outcome", "Plan", "Refused", "RunnerError", "execute", "new_run_id", "writing_to"]

POLL_S = 0.02


@dataclass(frozen=True)
class Outcome:
    """What a run measured, and how many jobs it left because its time budget ran out or a signal interrupted it.

    `notes` say which GPUs the run stopped using, and why.
    """

    records: tuple[Record, ...]
    num_left: int
    interrupted: bool = False
    notes: tuple[str, ...] = ()


def execute(
    *plans: Plan,
    on_record: Callable[[Record], None] = lambda row: None,
    on_environment: Callable[[Environment], None] = lambda environment: None,
    time_budget_s: float | None = None,
) -> Outcome:
    """Measure every job of the plans, one plan after the other.

    Each record is in its plan's journal before `on_record` gets it. A job whose process dies or hangs gets a record
    that says so, and a new process measures the next jobs. Ctrl-C, SIGTERM and SIGHUP end the run at once. When the
    time budget (of all plans together) is spent, the run ends after the jobs that are running. The records of measured
    jobs stay in the journal. `on_environment` gets the environment of each worker before the worker gets a job. Raises
    RunnerError where no worker starts or the disk is full. Raises Refused where a worker reports that a requested
    backend or device is not there.
    """
    run = Run(plans, Stop.after(time_budget_s), on_record, on_environment)
    with run.stop.at_signals(), run.kept():
        for plan in plans:
            with writing_to(plan.folder):
                (plan.folder / "logs").mkdir(parents=True, exist_ok=True)
                for processes in sorted({job.case.processes for job in plan.jobs}):
                    _Crew(plan, processes, run).work()
    return run.outcome


@dataclass
class Run:
    """What the plans have measured so far, and whether the run should end."""

    plans: Sequence[Plan]
    stop: "Stop"
    on_record: Callable[[Record], None]
    on_environment: Callable[[Environment], None]
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    journals: dict[Path, Journal] = field(default_factory=dict)  # by their folder
    environments: dict[Path, bytes] = field(default_factory=dict)  # the content of each file

    def keep(self, plan: Plan, row: Record) -> None:
        """Write the record to the plan's journal, and only then pass it on."""
        journal = self.journals.setdefault(plan.folder, Journal(plan.folder / JOURNAL_NAME))
        journal.append(row)
        self.records.append(row)
        self.on_record(row)

    def meet(self, plan: Plan, environment: Environment) -> None:
        """Check the environment of a new worker with `on_environment`, and write it to the plan's folder.

        The check comes before the worker measures anything.
        """
        self._keep_environments()
        self.on_environment(environment)
        file = _file_of(environment, plan.folder)
        content = content_of(file)
        if content is None:
            content = environment.to_json().encode()
            file.parent.mkdir(exist_ok=True)
            write = write_again if os.path.lexists(file) else write_atomically
            write(file, content)
        self.environments.setdefault(file, content)

    def _keep_environments(self) -> None:
        for file, content in self.environments.items():
            if content_of(file) != content:
                self.notes.append(f"{file}: another process changed or removed it; moebench wrote it again")
                write_again(file, content)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """At the end of the block, write again what another process changed or removed of the run's results."""
        try:
            yield
        except BaseException:  # the error of the run is the one to tell
            with suppress(RunnerError):
                self._keep_all()
            raise
        self._keep_all()

    def _keep_all(self) -> None:
        for journal in self.journals.values():
            journal.keep()
            if journal.num_restored:
                self.notes.append(
                    f"{journal.path}: another process changed or removed it {journal.num_restored} times during the "
                    "run; moebench wrote it again, and no row is lost"
                )
        self._keep_environments()

    @property
    def outcome(self) -> Outcome:
        num_left = sum(len(plan.jobs) for plan in self.plans) - len(self.records)
        return Outcome(tuple(self.records), num_left, self.stop.interrupted, tuple(self.notes))


def _file_of(environment: Environment, folder: Path) -> Path:
    """Return the folder's file for an environment.

    The run's own environment has the file ENVIRONMENT_NAME. A run that was resumed by force may have further
    environments, which have files in ENVIRONMENTS_NAME.
    """
    first = folder / ENVIRONMENT_NAME
    was = Environment.from_file(first) if first.exists() else environment
    if was.env_id != environment.env_id:
        return folder / ENVIRONMENTS_NAME / f"{environment.env_id}.json"
    if was.code != environment.code:  # times may be compared, but other code ran
        return folder / ENVIRONMENTS_NAME / f"{environment.env_id}-{environment.code_name}.json"
    return first


@dataclass
class _Crew:
    """The workers of one plan for the jobs of as many processes, one worker at each place.

    `due` has what is left of the case that a place measures, in parts, each for one worker.
    """

    plan: Plan
    processes: Processes
    run: Run
    workers: dict[int, WorkerProcess] = field(default_factory=dict)  # by the number of their place
    due: dict[int, list[tuple[Job, ...]]] = field(default_factory=dict)  # by the number of the place
    met: bool = False

    def __post_init__(self) -> None:
        self.backlog = Backlog(job for job in self.plan.jobs if job.case.processes == self.processes)
        found = places(self.plan.slots, self.processes.num_ranks)
        self.places: dict[int, Place] = {n: LocalPlace(slots, len(found)) for n, slots in enumerate(found)}

    def work(self) -> None:
        """Look at every place in turn until no job is left or the run should end. Then end the workers."""
        try:
            while not self.run.stop.interrupted:
                heard = [self._look_at(number) for number in list(self.places)]
                if not self.workers and (self.run.stop() or not (len(self.backlog) or any(self.due.values()))):
                    return
                if not any(heard):
                    time.sleep(POLL_S)
        finally:
            for worker in self.workers.values():
                worker.end()

    def _look_at(self, number: int) -> bool:
        """Keep the new records of the worker at a place, and end the worker where it is over or has no more jobs.

        Where the place has no worker, start one. Return whether there was anything to do.
        """
        worker = self.workers.get(number)
        if worker is None:
            return self._start_at(number)
        knew = worker.environment
        heard = False
        try:
            for row in worker.watch(self.run.stop):
                heard = True
                self.run.keep(self.plan, row)
        except RunnerError as failure:
            if not self.met or len(self.places) == 1:
                raise
            self._give_up(number, failure)
            return True
        if knew is None and worker.environment is not None:
            self._meet(worker.environment)
        is_free = worker.environment is not None and not worker.unfinished
        if is_free and not worker.over:
            worker.give(self._next_for(number, worker))
            is_free = not worker.unfinished
        if worker.over or is_free or (self.run.stop() and worker.job is None):
            self._end(number)
            return True
        return heard

    def _start_at(self, number: int) -> bool:
        """Start a worker at a place, if there is work for it. Return whether one was started.

        The first worker starts before all others: what it refuses, all would refuse. If torch sees no GPU, the first
        worker is the only worker.
        """
        place = self.places.get(number)
        has_work = bool(len(self.backlog) or self.due.get(number))
        if place is None or self.run.stop() or not has_work or (self.workers and not self.met):
            return False
        self.workers[number] = WorkerProcess(self.plan, place, self.processes)
        return True

    def _meet(self, environment: Environment) -> None:
        self.run.meet(self.plan, environment)
        if environment.device == "cpu" and self.plan.slots[0].gpu is not None:
            self.places = {
                number: self.places[number] for number in self.workers
            }  # torch sees no GPU, so only one worker runs, on the CPU
        self.met = True

    def _next_for(self, number: int, worker: WorkerProcess) -> tuple[Job, ...]:
        """Return the next jobs for the worker at a place; empty where another worker must measure the place's next."""
        due = self.due.setdefault(number, [])
        if not due:
            due += parts(self._case_for(worker))
        return due.pop(0) if due and worker.may_take(due[0]) else ()

    def _case_for(self, worker: WorkerProcess) -> tuple[Job, ...]:
        if len(self.places) == 1:
            return self.backlog.take()
        others = [other.weights for other in self.workers.values() if other is not worker and other.weights]
        return self.backlog.take(worker.weights, others)

    def _end(self, number: int) -> None:
        """End the worker at a place. The place's next worker measures what this one left."""
        worker = self.workers.pop(number)
        if worker.unfinished:
            self.due.setdefault(number, []).insert(0, tuple(worker.unfinished))
        worker.end()

    def _give_up(self, number: int, failure: RunnerError) -> None:
        """Stop using a place where no worker starts any more, for example on a lost GPU. The other places go on."""
        self._end(number)
        for part in reversed(self.due.pop(number, [])):
            self.backlog.put_back(part)
        self.run.notes.append(f"{self.places.pop(number).name}: no longer used, because {failure}")
