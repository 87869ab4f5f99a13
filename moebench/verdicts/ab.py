"""Two revisions of `experts`, driven by this harness side by side until every job is decided. No torch here.

A round is four fresh processes, two of A and two of B, and only times of one round are compared. On a CPU they live
side by side and take turns, job by job in random order, so that what disturbs the machine disturbs both sides; on GPUs,
whose memory they would have to share, they run one after the other, in random order. Both A of a round, against each
other, show how often this machine raises a false alarm. moebench.verdicts.looks says when to stop.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
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
from moebench.run.order import shuffled
from moebench.run.request import RunPlan
from moebench.run.runfile import SWEEP_NAME
from moebench.run.runner import Outcome, Plan, execute
from moebench.run.turns import execute_in_turns
from moebench.verdicts.comparability import Comparability
from moebench.verdicts.findings import Row, is_ok, rounds_of
from moebench.verdicts.gate import GateResult, Judged, SelfComparison, gate, self_comparison, sides
from moebench.verdicts.looks import LOOK_FALSE_ALARMS, LOOK_WRONG_PASSES, RUNS_A_SIDE, block_of, schedule, until_decided
from moebench.verdicts.revisions import Revision, copy_experts, unknown_backends
from moebench.verdicts.verdict import Verdict
from moebench.workload.case import Job

AB_NAME = "ab.json"


@dataclass(frozen=True)
class AbPlan:
    """The jobs of a run, on two revisions. Results of A go to the run's folder `a`, those of B to `b`.

    `only_a`, `only_b`: jobs whose backend the other revision does not have. `looks`: the rounds at each.
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
        """Whether the processes of a round live side by side."""
        return all(slot.gpu is None for slot in self.run.rounds[0].slots)

    @property
    def folders(self) -> tuple[Path, Path]:
        return self.run.folder / "a", self.run.folder / "b"

    def round(self, jobs: Collection[Job], number: int) -> list[Plan]:
        """The processes of a round, in random order; `block_of` of the rounds they write is its number.

        They use as many GPUs as the largest EP size needs: what is compared is measured on the same.
        """
        both, (folder_a, folder_b) = set(jobs), self.folders
        alone_a, alone_b = (self.only_a, self.only_b) if number == 0 else ((), ())  # nothing to compare: once will do
        whole = self.run.rounds[0]
        base = replace(whole, slots=whole.slots[: max(job.case.ep_size for job in self.run.jobs)])

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
    """The verdicts after so many rounds, and what was left unmeasured of those because the time was spent."""

    num_rounds: int
    result: GateResult
    num_left: int


@contextmanager
def prepared(run: RunPlan, revision_a: str, revision_b: str, threshold: float) -> Iterator[AbPlan]:
    """Make the run's folder, with copies of both revisions in it until the end. Raises RevisionError, UsageError.

    Where nothing was measured, the folder goes too: the command, set right, may name it again.
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
        raise UsageError("\n".join(nowhere))
    if names <= not_in_a.keys() | not_in_b.keys():
        raise UsageError(f"{a} and {b} have no backend of this sweep in common: {', '.join(sorted(names))}")
    only_a = frozenset(job for job in run.jobs if job.backend in not_in_b)
    only_b = frozenset(job for job in run.jobs if job.backend in not_in_a)
    return AbPlan(run, a, b, only_a, only_b, schedule(len(run.jobs) - len(only_a) - len(only_b)), threshold)


def compare_revisions(plan: AbPlan, on_record: Callable[[Record], None]) -> Iterator[Look]:
    """Measure, and judge at every look, until all is decided or the time is spent.

    Raises Interrupted; what was measured is in the folders of both sides, whatever ends this.
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
            raise Interrupted(f"interrupted; what was measured is in {plan.folders[0]} and {plan.folders[1]}")
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
    """What was asked for, beside the results to come."""
    asked = {"revisions": {"a": str(plan.a), "b": str(plan.b)}, "looks": plan.looks, "threshold": plan.threshold}
    content = plan.run.run.model_dump(mode="json", exclude={"resumed", "num_rounds"}) | asked
    write_atomically(plan.run.folder / AB_NAME, (json.dumps(content, indent=2) + "\n").encode())
    write_atomically(plan.run.folder / SWEEP_NAME, plan.run.sweep_text)


def _verdict_on_time(judged: Judged | None) -> Verdict:
    """What more rounds could change: memory and parity are what they are. None: not measured on both sides yet."""
    if judged is None:
        return Verdict.INCONCLUSIVE
    time = judged.finding("time")
    return judged.verdict if time is None else time.verdict


def _judge(plan: AbPlan) -> GateResult:
    if not all((folder / JOURNAL_NAME).exists() for folder in plan.folders):
        raise UsageError("--time-budget: spent before both sides had measured a job; give it more minutes")
    before, after = (open_result(folder) for folder in plan.folders)
    return gate(
        before.frame,
        after.frame,
        Comparability(before.environments, after.environments),
        threshold=plan.threshold,
        false_alarms=LOOK_FALSE_ALARMS,
        wrong_passes=LOOK_WRONG_PASSES,
        self_comparisons=[_a_against_itself(before.frame.to_dict("records"), plan.threshold)],
        block_of=block_of,
    )


def _a_against_itself(rows: Sequence[Row], threshold: float) -> SelfComparison:
    """The first process of A in each round against the second."""
    family = {}
    for number, row in enumerate(filter(is_ok, rows)):
        rounds = rounds_of(row)
        first, second = ({run: rounds[run] for run in rounds if run % RUNS_A_SIDE == which} for which in (0, 1))
        family[number] = sides(first, second, block_of)
    return self_comparison("A against itself", family, threshold, LOOK_FALSE_ALARMS)
