"""Hold the jobs that are left, and give them to workers case by case."""

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from moebench.workload.backends import is_built_in
from moebench.workload.case import Case, Job, Weights


def own_backend(job: Job) -> str | None:
    """Return the job's backend if it needs a worker of its own; None if the job shares a worker with other jobs.

    A backend that is not built in needs one, because what it does to its process must not reach another backend.
    `moebench parity` runs each backend by itself, so the checks of a backend share a worker.
    """
    return None if job.check is not None or is_built_in(job.backend) else job.backend


def parts(jobs: Iterable[Job]) -> list[tuple[Job, ...]]:
    """Return the jobs in their order, in parts: one worker measures one part, or several that all share a worker."""
    return [tuple(part) for _, part in itertools.groupby(jobs, key=lambda job: (job.case, own_backend(job)))]


class Backlog:
    """Jobs in their order. One place takes all backends of a case, so that the backends are compared on one GPU."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._num_jobs = 0
        self._groups: dict[Weights, deque[_Unit]] = {}  # cases with the same weights, in their order
        for number, (_, unit) in enumerate(itertools.groupby(jobs, key=lambda job: job.case)):
            self._add(_Unit(number, tuple(unit)), deque.append)
        self._front = 0  # the number of the first case

    def _add(self, unit: "_Unit", put: Callable[[deque["_Unit"], "_Unit"], None]) -> None:
        put(self._groups.setdefault(unit.case.weights, deque()), unit)
        self._num_jobs += len(unit.jobs)

    def __len__(self) -> int:
        """Return how many jobs are left."""
        return self._num_jobs

    def has_for(self, may: Callable[[Case], bool]) -> bool:
        """Whether a case is left that `may` allows."""
        return any(may(unit.case) for group in self._groups.values() for unit in group)

    def take(
        self,
        mine: Weights | None = None,
        others: Collection[Weights] = (),
        may: Callable[[Case], bool] = lambda case: True,
    ) -> tuple[Job, ...]:
        """Return the next case's jobs for a worker that holds the weights `mine`; empty if no job is left.

        Only cases that `may` allows are taken.

        The result is the first case with the weights `mine`, else the first case with weights that no other worker
        holds (`others`), else the first case. A worker makes weights once, so it should keep its weights as
        long as it can.
        """
        first = self._first_of(mine, may) if mine is not None else None
        if first is None:
            held = set(others)
            allowed = [unit for weights in self._groups if (unit := self._first_of(weights, may)) is not None]
            if not allowed:
                return ()
            first = min(allowed, key=lambda unit: (unit.case.weights in held, unit.number))
        group = self._groups[first.case.weights]
        group.remove(first)
        if not group:
            del self._groups[first.case.weights]
        self._num_jobs -= len(first.jobs)
        return first.jobs

    def _first_of(self, weights: Weights, may: Callable[[Case], bool]) -> "_Unit | None":
        return next((unit for unit in self._groups.get(weights, ()) if may(unit.case)), None)

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Put jobs back at the front, because their worker ended before it measured them."""
        if jobs:
            self._front -= 1
            self._add(_Unit(self._front, tuple(jobs)), deque.appendleft)


@dataclass(frozen=True)
class _Unit:
    """The jobs of a case that are left, and the number of the case in the order of cases."""

    number: int
    jobs: tuple[Job, ...]

    @property
    def case(self) -> Case:
        return self.jobs[0].case
