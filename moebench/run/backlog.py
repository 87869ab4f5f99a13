"""Hold the jobs that are left, and give them to workers case by case."""

import itertools
from collections.abc import Iterable, Sequence

from moebench.workload.case import Job, Weights


class Backlog:
    """Jobs in their order. One worker takes all backends of a case, so that the backends are compared on one GPU."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._units = [tuple(unit) for _, unit in itertools.groupby(jobs, key=lambda job: job.case)]

    def __len__(self) -> int:
        """Return how many jobs are left."""
        return sum(map(len, self._units))

    def take(self, mine: Weights | None = None, others: Sequence[Weights] = ()) -> tuple[Job, ...]:
        """Return the next case's jobs for a worker that holds the weights `mine`; empty if no job is left.

        The result is the first case with the weights `mine`, else the first case with weights that no other worker
        holds (`others`), else the first case. A worker makes weights once, so it should keep its weights as
        long as it can.
        """
        if not self._units:
            return ()
        unit = next(
            itertools.chain(
                (unit for unit in self._units if unit[0].case.weights == mine),
                (unit for unit in self._units if unit[0].case.weights not in others),
                self._units,
            )
        )
        self._units.remove(unit)
        return unit

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Put jobs back at the front, because their worker ended before it measured them."""
        if jobs:
            self._units.insert(0, tuple(jobs))
