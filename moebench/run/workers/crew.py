"""Hand out the jobs of one plan to workers, one worker at each place, until every job is measured."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moebench.errors import Refused, RunnerError
from moebench.machine.environment import Environment
from moebench.run.backlog import Backlog, parts
from moebench.run.plan import Plan
from moebench.run.supervisor import WorkerProcess
from moebench.run.workers.group import Place, Site
from moebench.workload.case import Case, Job, JobKey
from moebench.workload.context import Processes

if TYPE_CHECKING:
    from moebench.run.runner import Run

POLL_S = 0.02
#: A job that was running on so many nodes when they died is to blame, and no other node gets it.
MOST_LOSSES = 3


@dataclass
class Crew:
    """The workers of one plan for the jobs of as many processes, one worker at each place of the site.

    `due` has what is left of the case that a place measures, in parts, each for one worker.
    """

    plan: Plan
    processes: Processes
    run: "Run"
    site: Site
    workers: dict[int, WorkerProcess] = field(default_factory=dict)  # by the number of their place
    due: dict[int, list[tuple[Job, ...]]] = field(default_factory=dict)  # by the number of the place
    environments: dict[int, str] = field(default_factory=dict)  # env_id, by the number of the place
    losses: Counter[JobKey] = field(default_factory=Counter)
    met: bool = False

    def __post_init__(self) -> None:
        self.backlog = Backlog(job for job in self.plan.jobs if job.case.processes == self.processes)
        self.places: dict[int, Place] = dict(self.site.places(self.processes.num_ranks))

    @property
    def has_jobs(self) -> bool:
        return bool(len(self.backlog) or any(self.due.values()))

    def work(self) -> None:
        """Look at every place in turn until no job is left or the run should end. Then end the workers."""
        try:
            while not self.run.stop.interrupted:
                heard = [self._look_at(number) for number in list(self.places)]
                if not self.workers and (self.run.stop() or not self.has_jobs):
                    return
                if not any(heard):
                    time.sleep(POLL_S)
                if self.site.is_cluster:
                    self._look_at_cluster()
        finally:
            for worker in self.workers.values():
                worker.end()

    def _look_at_cluster(self) -> None:
        """Take the places of nodes that have come, and leave those that are gone.

        Raises RunnerError if jobs are left and none of the places may measure them.
        """
        now = self.site.places(self.processes.num_ranks)
        for number in self.places.keys() - now.keys() - self.workers.keys():
            self._leave(number)
        self.places |= {number: place for number, place in now.items() if number not in self.places}
        may_all = [self._has_work(number) for number in self.places]
        if not self.workers and not any(may_all) and self.has_jobs:
            raise RunnerError(
                f"{len(self.backlog)} jobs are left, and their cases were begun in an environment that no node has any "
                "more; --resume goes on with a cluster that has such a node"
            )

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
            if knew is None and worker.environment is not None:
                self._meet(number, worker.environment)
        except RunnerError as failure:
            if len(self.places) == 1 or self._is_for_all(failure, worker):
                raise
            self._give_up(number, failure)
            return True
        if worker.lost:
            self._lose(number, worker)
            return True
        is_free = worker.environment is not None and not worker.unfinished
        if is_free and not worker.over:
            worker.give(self._next_for(number, worker))
            is_free = not worker.unfinished
        if worker.over or is_free or (self.run.stop() and worker.job is None):
            self._end(number)
            return True
        return heard

    def _is_for_all(self, failure: RunnerError, worker: WorkerProcess) -> bool:
        """Whether what failed at one place would fail at all places.

        What the first worker of all refuses, all would refuse. On a cluster, machines may differ: a node that does not
        start a worker, or has another environment than a resumed run, is left to itself.
        """
        if self.met:
            return False
        return not self.site.is_cluster or (isinstance(failure, Refused) and worker.environment is None)

    def _has_work(self, number: int) -> bool:
        env_id = self.environments.get(number)
        return bool(self.due.get(number)) or self.backlog.has_for(lambda case: self._may(case, env_id))

    def _may(self, case: Case, env_id: str | None) -> bool:
        """Whether a place with this environment may measure the case: one case has one environment."""
        begun = self.run.begun.get(case.case_id) if self.site.is_cluster else None
        return begun is None or env_id is None or begun == env_id

    def _start_at(self, number: int) -> bool:
        """Start a worker at a place, if there is work for it. Return whether one was started.

        The first worker starts before all others: what it refuses, all would refuse. If torch sees no GPU, the first
        worker is the only worker.
        """
        place = self.places.get(number)
        if place is None or self.run.stop() or not self._has_work(number) or (self.workers and not self.met):
            return False
        if place.lost or not place.is_ready():
            return False
        self.workers[number] = WorkerProcess(self.plan, place, self.processes)
        return True

    def _meet(self, number: int, environment: Environment) -> None:
        self.run.meet(self.plan, environment)
        self.environments[number] = environment.env_id
        if environment.device == "cpu" and not self.site.is_cluster and self.plan.slots[0].gpu is not None:
            self.places = {
                number: self.places[number] for number in self.workers
            }  # torch sees no GPU, so only one worker runs, on the CPU
        self.met = True

    def _next_for(self, number: int, worker: WorkerProcess) -> tuple[Job, ...]:
        """Return the next jobs for the worker at a place; empty where another worker must measure the place's next."""
        due = self.due.setdefault(number, [])
        if not due:
            due += parts(self._case_for(number, worker))
        return due.pop(0) if due and worker.may_take(due[0]) else ()

    def _case_for(self, number: int, worker: WorkerProcess) -> tuple[Job, ...]:
        if len(self.places) == 1 and not self.site.is_cluster:
            return self.backlog.take()
        others = [other.weights for other in self.workers.values() if other is not worker and other.weights]
        env_id = self.environments[number]
        return self.backlog.take(worker.weights, others, lambda case: self._may(case, env_id))

    def _end(self, number: int) -> None:
        """End the worker at a place. The place's next worker measures what this one left."""
        worker = self.workers.pop(number)
        if worker.unfinished:
            self.due.setdefault(number, []).insert(0, tuple(worker.unfinished))
        worker.end()

    def _give_up(self, number: int, failure: RunnerError) -> None:
        """Stop using a place where no worker starts any more, for example on a lost GPU. The other places go on."""
        self._end(number)
        self.site.give_up(number)
        self.run.notes.append(f"{self.places[number].name}: no longer used, because {failure}")
        self._leave(number)

    def _lose(self, number: int, worker: WorkerProcess) -> None:
        """Give the jobs of a place whose node is gone to the other places."""
        if worker.environment is None:
            self.site.give_up(number)  # starting a worker may be what ends the node
        if worker.unfinished:
            job = worker.job or worker.unfinished[0]  # the node may have died before it could say that the job began
            self.losses[job.key] += 1
            if self.losses[job.key] >= MOST_LOSSES:
                detail = f"{MOST_LOSSES} nodes were lost while they ran this job; the last: {worker.lost}"
                self.run.keep(self.plan, worker.blamed(detail))
        self._end(number)
        self.run.notes.append(f"{self.places[number].name}: lost, because {worker.lost}")
        self._leave(number)

    def _leave(self, number: int) -> None:
        """Take the place away. What it had to measure goes back to the others, a case in one piece."""
        self.backlog.put_back([job for part in self.due.pop(number, []) for job in part])
        del self.places[number]
