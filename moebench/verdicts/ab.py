"""Measure two revisions of `experts` side by side until every job is decided.

A and B are the two revisions. A round has four fresh processes, two of A and two of B. Only times of the same round are
compared. On a CPU the four processes live at the same time and take turns, job by job in random order, so that a
disturbance of the machine hits both revisions. On a GPU the processes run one after the other in random order, because
processes that live at the same time would share the GPU's memory. Each round also compares its two processes of A with
each other: this shows how often the machine raises a false alarm. moebench.verdicts.looks decides when to stop.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from moebench.errors import Interrupted, UsageError
from moebench.results.files import write_atomically
from moebench.results.folder import open_result
from moebench.results.frame import load, write
from moebench.results.journal import JOURNAL_NAME
from moebench.results.record import Record
from moebench.results.stats import THRESHOLD
from moebench.run.lock import locked
from moebench.run.plan import shuffled
from moebench.run.request import RunPlan
from moebench.run.runfile import SWEEP_NAME
from moebench.run.runner import Outcome, Plan, execute
from moebench.run.turns import execute_in_turns
from moebench.verdicts.comparability import Comparability
from moebench.verdicts.findings import BY_ROUND, Row, is_ok
from moebench.verdicts.gate import GateResult, Judged, SelfComparison, gate, self_comparisons_of, sides
from moebench.verdicts.looks import LOOK_FALSE_ALARMS, LOOK_WRONG_PASSES, RUNS_A_SIDE, block_of, schedule, until_decided
from moebench.verdicts.revisions import Revision, copy_experts, unknown_backends
from moebench.verdicts.times import Sides
from moebench.verdicts.verdict import Verdict
from moebench.workload.case import Job

AB_NAME = "ab.json"


@dataclass(frozen=True)
class AbPlan:
    """The plan to measure the jobs of a run with two revisions.

    `run`: the jobs and the folder. The results of A go into its subfolder `a`, and the results of B into `b`.
    `a`, `b`: the copies of the two revisions.
    `only_a`, `only_b`: the jobs with a backend that only this revision has.
    `looks`: the total number of rounds at each look.
    `threshold`: the smallest slowdown that must not pass, as a share.
    """

    run: RunPlan
    a: Revision
    b: Revision
    only_a: frozenset[Job]
    only_b: frozenset[Job]
    looks: tuple[int, ...]
    threshold: float = THRESHOLD

    @property
    def common(self) -> tuple[Job, ...]:
        return tuple(job for job in self.run.jobs if job not in self.only_a | self.only_b)

    @property
    def in_turns(self) -> bool:
        """Whether the processes of a round live at the same time and take turns: true if the run uses no GPU."""
        return all(slot.gpu is None for slot in self.run.rounds[0].slots)

    @property
    def folders(self) -> tuple[Path, Path]:
        return self.run.folder / "a", self.run.folder / "b"

    def round(self, jobs: Collection[Job], number: int) -> list[Plan]:
        """Return the plans of the four processes of round `number`, in random order.

        Each process writes its records under a round number of its own. `looks.block_of` turns that number back into
        `number`. The processes use only as many GPUs as the job with most ranks needs, so that all processes
        measure on the same GPUs.
        """
        both, (folder_a, folder_b) = set(jobs), self.folders
        alone_a, alone_b = (self.only_a, self.only_b) if number == 0 else ((), ())  # nothing to compare: measure once
        whole = self.run.rounds[0]
        base = replace(whole, slots=whole.slots[: max(job.case.processes.num_ranks for job in self.run.jobs)])

        def process(revision: Revision, folder: Path, its_round: int, alone: Collection[Job]) -> Plan:
            order = shuffled(both.union(alone), self.run.run_id, number)
            return replace(base, jobs=order, folder=folder, round=its_round, experts_folder=revision.folder)

        both_sides = (self.a, folder_a, alone_a), (self.b, folder_b, alone_b)
        plans = [
            process(revision, folder, RUNS_A_SIDE * number + run, alone if run == 0 else ())
            for revision, folder, alone in both_sides
            for run in range(RUNS_A_SIDE)
        ]
        random.Random(f"{self.run.run_id} {number}").shuffle(plans)
        return plans


@dataclass(frozen=True)
class Look:
    """The verdicts after `num_rounds` rounds.

    `num_left` is the number of measurements that the time budget left out.
    """

    num_rounds: int
    result: GateResult
    num_left: int


@contextmanager
def prepared(run: RunPlan, revision_a: str, revision_b: str, threshold: float) -> Iterator[AbPlan]:
    """Make the run's folder, and keep copies of both revisions in the folder until the block ends.

    If nothing was measured, the end of the block removes the folder if it is new, and empties it if it existed before.
    The user can then name the same folder in a corrected command. Raises RevisionError if a revision cannot be
    measured. Raises UsageError if neither revision has a backend of the run, or if they have no backend of the run in
    common.
    """
    existed, copies = run.folder.exists(), run.folder / "experts"
    with locked(run.folder):
        try:
            a, b = copy_experts(revision_a, copies / "a"), copy_experts(revision_b, copies / "b")
            yield _plan(run, a, b, threshold)
        finally:
            shutil.rmtree(copies, ignore_errors=True)
            if not any(run.folder.glob(f"*/{JOURNAL_NAME}")):
                shutil.rmtree(run.folder, ignore_errors=True)
                if existed:
                    run.folder.mkdir()


def _plan(run: RunPlan, a: Revision, b: Revision, threshold: float) -> AbPlan:
    names = {job.backend for job in run.jobs}
    not_in_a, not_in_b = unknown_backends(a, names), unknown_backends(b, names)
    nowhere = [not_in_a[name] for name in not_in_a if name in not_in_b]
    if nowhere:
        raise UsageError(*nowhere)
    if names <= not_in_a.keys() | not_in_b.keys():
        raise UsageError(f"{a} and {b} have no backend of this sweep in common: {', '.join(sorted(names))}")
    only_a = frozenset(job for job in run.jobs if job.backend in not_in_b)
    only_b = frozenset(job for job in run.jobs if job.backend in not_in_a)
    return AbPlan(run, a, b, only_a, only_b, schedule(len(run.jobs) - len(only_a) - len(only_b)), threshold)


def compare_revisions(plan: AbPlan, on_record: Callable[[Record], None]) -> Iterator[Look]:
    """Measure both revisions until every job is decided or the time budget is spent. Yield the verdicts of each look.

    `on_record` is called with each new record. Raises Interrupted if the user presses Ctrl-C. However the measuring
    ends, the folders `plan.folders` keep all finished measurements.
    """
    _note(plan)
    budget_s, started = plan.run.time_budget_s, time.monotonic()
    outcome, result = Outcome((), 0), GateResult((), plan.threshold, LOOK_FALSE_ALARMS)

    def measure_rounds(jobs: Sequence[Job], rounds: range) -> bool:
        nonlocal outcome
        left_s = None if budget_s is None else budget_s - (time.monotonic() - started)
        planned = [plan.round(jobs, number) for number in rounds]
        if plan.in_turns:
            outcome = execute_in_turns(*planned, on_record=on_record, time_budget_s=left_s)
        else:
            outcome = execute(*chain.from_iterable(planned), on_record=on_record, time_budget_s=left_s)
        if outcome.interrupted:
            raise Interrupted(f"interrupted; all finished measurements are in {plan.folders[0]} and {plan.folders[1]}")
        return not outcome.num_left

    def judge() -> dict[Job, Verdict]:
        nonlocal result
        result = _judge(plan)
        judged = {job.key: job for job in result.jobs}
        return {job: _verdict_on_time(judged.get(job.key)) for job in plan.common}

    for num_rounds in until_decided(plan.common, plan.looks, measure_rounds, judge):
        yield Look(num_rounds, result, outcome.num_left)
    for folder in plan.folders:
        write(load(folder), folder)


def _note(plan: AbPlan) -> None:
    """Write the request and the sweep into the run's folder."""
    asked = {"revisions": {"a": str(plan.a), "b": str(plan.b)}, "looks": plan.looks, "threshold": plan.threshold}
    content = plan.run.run.model_dump(mode="json", exclude={"resumed", "num_rounds"}) | asked
    write_atomically(plan.run.folder / AB_NAME, (json.dumps(content, indent=2) + "\n").encode())
    write_atomically(plan.run.folder / SWEEP_NAME, plan.run.sweep_text)


def _verdict_on_time(judged: Judged | None) -> Verdict:
    """Return the worst verdict on a time of a job, or the job's verdict if it has none on a time.

    The times are the time of the call and the GPU's own time. Only the verdicts on times can change with more rounds.
    Memory and parity stay the same. `judged` is None if not both revisions have measured the job yet; the verdict is
    then INCONCLUSIVE.
    """
    if judged is None:
        return Verdict.INCONCLUSIVE
    found = [finding.verdict for finding in judged.findings if finding.measure in BY_ROUND]
    return min(found, key=lambda verdict: verdict.rank, default=judged.verdict)


def _judge(plan: AbPlan) -> GateResult:
    if not all((folder / JOURNAL_NAME).exists() for folder in plan.folders):
        raise UsageError("--time-budget: spent before both sides had measured a job; give more minutes")
    before, after = (open_result(folder) for folder in plan.folders)
    return gate(
        before.frame,
        after.frame,
        Comparability(before.environments, after.environments),
        threshold=plan.threshold,
        false_alarms=LOOK_FALSE_ALARMS,
        wrong_passes=LOOK_WRONG_PASSES,
        self_comparisons=_a_against_itself(before.frame.to_dict("records"), plan.threshold),
        block_of=block_of,
    )


def _a_against_itself(rows: Sequence[Row], threshold: float) -> list[SelfComparison]:
    """Compare the first process of A in each round with the second process of A, job by job."""

    def split(rounds: Mapping[int, float]) -> Sides:
        first, second = ({run: rounds[run] for run in rounds if run % RUNS_A_SIDE == which} for which in (0, 1))
        return sides(first, second, block_of)

    return self_comparisons_of("A against itself", [*filter(is_ok, rows)], split, threshold, LOOK_FALSE_ALARMS)
