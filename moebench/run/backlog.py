"""The jobs that are left, handed out to workers case by case. No torch here."""

import itertools
from collections.abc import Iterable, Sequence

from moebench.workload.case import Job, Weights


class Backlog:
    """Jobs in their order. The backends of a case go to one worker, so that they are compared on one GPU."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._units = [tuple(unit) for _, unit in itertools.groupby(jobs, key=lambda job: job.case)]

    def __len__(self) -> int:
        """How many jobs are left."""
        return sum(map(len, self._units))

    def take(self, mine: Weights | None = None, others: Sequence[Weights] = ()) -> tuple[Job, ...]:
        """The next case's jobs for a worker that holds weights `mine`: of those if it can, else not of the `others`.

        Weights are made once a worker, so that each stays with its own while there are others to choose.
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
        """These come next: a worker ended before it could measure them."""
        if jobs:
            self._units.insert(0, tuple(jobs))
