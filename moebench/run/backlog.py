"""Hold the jobs that are left, and give them to workers case by case."""

import itertools
from collections.abc import Callable, Iterable, Sequence

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
        self._units = [tuple(unit) for _, unit in itertools.groupby(jobs, key=lambda job: job.case)]

    def __len__(self) -> int:
        """Return how many jobs are left."""
        return sum(map(len, self._units))

    def has_for(self, may: Callable[[Case], bool]) -> bool:
        """Whether a case is left that `may` allows."""
        return any(may(unit[0].case) for unit in self._units)

    def take(
        self,
        mine: Weights | None = None,
        others: Sequence[Weights] = (),
        may: Callable[[Case], bool] = lambda case: True,
    ) -> tuple[Job, ...]:
        """Return the next case's jobs for a worker that holds the weights `mine`; empty if no job is left.

        Only cases that `may` allows are taken.

        The result is the first case with the weights `mine`, else the first case with weights that no other worker
        holds (`others`), else the first case. A worker makes weights once, so it should keep its weights as
        long as it can.
        """
        units = [unit for unit in self._units if may(unit[0].case)]
        if not units:
            return ()
        unit = next(
            itertools.chain(
                (unit for unit in units if unit[0].case.weights == mine),
                (unit for unit in units if unit[0].case.weights not in others),
                units,
            )
        )
        self._units.remove(unit)
        return unit

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Put jobs back at the front, because their worker ended before it measured them."""
        if jobs:
            self._units.insert(0, tuple(jobs))
