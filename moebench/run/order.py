"""Put the jobs of a round into the order in which they are measured."""

import random
from collections.abc import Callable, Iterable
from typing import Any

from moebench.workload.case import Job


def shuffled(jobs: Iterable[Job], run_id: str, number: int) -> tuple[Job, ...]:
    """Return the jobs of one round in a random order that depends only on the run's id and the round's number.

    Jobs of one EP size stay together, in ascending order of the EP size. Within one EP size, the cases with the same
    weights stay together, so that a worker makes the weights once. The order is random among these groups, among the
    cases of a group, and among the backends of a case.
    """
    draw = random.Random(f"{run_id} {number}")
    ordered = sorted(jobs, key=lambda job: job.key)  # so that the order of `jobs` does not matter

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
