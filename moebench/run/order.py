"""The order in which a round's jobs are measured."""

import random
from collections.abc import Callable, Iterable
from typing import Any

from moebench.workload.case import Job


def shuffled(jobs: Iterable[Job], run_id: str, number: int) -> tuple[Job, ...]:
    """The jobs of a run's round, by its number, in an order that those two alone decide.

    Random are the backends of a case, the cases of those weights, which are made once, and such groups of cases.
    """
    draw = random.Random(f"{run_id} {number}")
    ordered = sorted(jobs, key=lambda job: job.key)  # whatever order they come in

    def grouped(some: Iterable[Job], key: Callable[[Job], Any]) -> list[list[Job]]:
        groups: dict[Any, list[Job]] = {}
        for job in some:
            groups.setdefault(key(job), []).append(job)
        found = list(groups.values())
        draw.shuffle(found)
        return found

    in_turn = (
        job
        for of_weights in grouped(ordered, lambda job: job.case.weights)
        for of_case in grouped(of_weights, lambda job: job.case)
        for (job,) in grouped(of_case, lambda job: job.key)
    )
    return tuple(sorted(in_turn, key=lambda job: job.case.ep_size))
