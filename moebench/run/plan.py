"""Define the plan of one round of a run: which jobs worker processes measure, in which order, where, and whereto."""

import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import moebench
from moebench.machine.gpus import ANYWHERE, Slot
from moebench.workload.case import Job
from moebench.workload.spec import Policy


@dataclass(frozen=True)
class Plan:
    """The jobs that fresh processes measure, their order, the slots that they run on, and the folder for the results.

    A run with several rounds has one plan for each round. `experts_folder` is a folder that holds a package `experts`.
    If `experts_folder` is not None, workers import that package, so that this harness drives another revision's
    backends. If `profile` is true, each job writes a profiler trace.
    """

    jobs: tuple[Job, ...]
    policy: Policy
    folder: Path
    run_id: str
    device: str | None = None
    round: int = 0
    experts_folder: Path | None = None
    slots: tuple[Slot, ...] = ANYWHERE
    profile: bool = False

    @cached_property
    def backends(self) -> tuple[str, ...]:
        """The backends of all jobs."""
        return tuple(dict.fromkeys(job.backend for job in self.jobs))

    @cached_property
    def are_checks(self) -> bool:
        """Whether a job is a check; then all are."""
        return any(job.check for job in self.jobs)


def new_run_id(sweep: str) -> str:
    """Return a name for a run's folder: the time when the run began, and its sweep."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{sweep}"


def importing_from(experts_folder: Path) -> dict[str, str]:
    """Return environment variables that make Python import `experts` from that folder, and moebench from its place."""
    harness = Path(moebench.__file__).resolve().parent.parent
    paths = [*map(str, (experts_folder.resolve(), harness, Path.cwd())), os.environ.get("PYTHONPATH", "")]
    # without PYTHONSAFEPATH, `python -m` looks first into the working folder, which may have another `experts`
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def shuffled(jobs: Iterable[Job], run_id: str, number: int) -> tuple[Job, ...]:
    """Return the jobs of one round in a random order that depends only on the run's id and the round's number.

    Jobs of as many processes stay together, those of few processes first. Within them, the cases with the same
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
    return tuple(sorted(in_turn, key=lambda job: job.case.processes))
