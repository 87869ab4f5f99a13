"""Two rows of one job -> what is found about parity and memory, and what of them may be compared. No torch here.

Memory is judged to the byte on a CPU. On a GPU torch's caching allocator counts whole the cached blocks that it hands
out, and which those are differs from process to process: only what exceeds that is a change. Parity is judged by the
status, and so by the error over its budget: what is over it is a mismatch.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moebench.machine.comparability import MEMORY_CHANGES, TIME_CHANGES, Difference
from moebench.results.record import GOOD, IMPOSSIBLY_FAST, Status
from moebench.verdicts.times import TimeVerdict, round_medians
from moebench.verdicts.verdict import Verdict
from moebench.workload.case import Case, Job

Row = Mapping[Hashable, Any]  # of a frame of results

_MEMORY_COLUMNS = {"peak": "peak_memory_bytes", "saved for backward": "saved_memory_bytes"}
#: Between two processes on an H200 (2026-11-23, 58 jobs) the same code differed by up to 0.33% and, where that is less,
#: by 0.2 MiB at the peak, by up to 0.6% or 1 MiB in what it saves for backward.
_GPU_SLACK, _GPU_SLACK_BYTES = 0.01, 2 << 20
#: Flags of a time that says nothing about the code.
_SPOILED = {"slowed_down": "slowed down by heat or a power brake", IMPOSSIBLY_FAST: "impossibly fast"}


@dataclass(frozen=True)
class Finding:
    """The verdict on one measure of a job."""

    measure: str  # "time", "memory", "parity"; "job" where there is but one side
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Pair:
    """A job in both results: its rows, all that differs between their environments, and what of that is not allowed."""

    baseline: Row
    candidate: Row
    differences: tuple[Difference, ...] = ()
    forbidding: tuple[Difference, ...] = ()

    @property
    def both_ok(self) -> bool:
        return is_ok(self.baseline) and is_ok(self.candidate)

    @property
    def why_incomparable(self) -> str:
        """What forbids to compare the times of the two; empty where nothing does."""
        one, two = (row["l2"] for row in (self.baseline, self.candidate))
        other_l2 = [] if is_null(one) or is_null(two) or one == two else [f"L2 {one} -> {two}"]
        spoiled = [
            f"{side} {why}: measure it again"
            for side, row in (("baseline", self.baseline), ("candidate", self.candidate))
            for flag, why in _SPOILED.items()
            if flag in row["flags"]
        ]
        return ", ".join([*map(str, self.forbidding), *other_l2, *spoiled])


def job_of(row: Row) -> Job:
    """The job that a row is about."""
    fields = {name: None if is_null(row[name]) else row[name] for name in Case.model_fields}
    return Job(case=Case.model_validate(fields), backend=row["backend"], dispatcher=row["dispatcher"])


def is_ok(row: Row) -> bool:
    return bool(row["status"] == Status.ok)


def is_null(cell: Any) -> bool:
    return cell is None or (pd.api.types.is_scalar(cell) and bool(pd.isna(cell)))


def rounds_of(row: Row) -> dict[int, float]:
    """The median of each round of a row by its number, ms; round 0 where the row does not say which sample is of which.

    Marked samples, of another clock than most, count only in a round that has no others.
    """
    samples, rounds, marked = row["samples_ms"], row["sample_rounds"], row["sample_marked"]
    if is_null(samples) or not len(samples):
        return {}
    numbers = np.zeros(len(samples)) if is_null(rounds) else np.asarray(rounds)
    usual = np.ones(len(samples), bool) if is_null(marked) else ~np.asarray(marked, bool)
    kept = usual | ~np.isin(numbers, numbers[usual])
    return round_medians(np.asarray(samples)[kept], numbers[kept])


def of_baseline_alone() -> tuple[Finding, ...]:
    return (Finding("job", Verdict.MISSING, "in the baseline, not in the candidate"),)


def of_candidate_alone(row: Row) -> tuple[Finding, ...]:
    new = Finding("job", Verdict.NEW, "in the candidate, not in the baseline")
    wrong = Status(row["status"]) not in GOOD
    return (new, Finding("parity", Verdict.REGRESSED, _said(row))) if wrong else (new,)


def of_pair(pair: Pair, time: TimeVerdict | None) -> tuple[Finding, ...]:
    """Time, memory and parity, or parity alone without speeds; `time` is None where the two may not be compared."""
    if not pair.both_ok:
        return (_parity(pair),)
    speed = Finding("time", Verdict.INCOMPARABLE, pair.why_incomparable)
    if time is not None:
        speed = Finding("time", time.verdict, time.reason)
    return (speed, *_memory(pair), _parity(pair))


def _parity(pair: Pair) -> Finding:
    before, after = Status(pair.baseline["status"]), Status(pair.candidate["status"])
    said = _said(pair.candidate)
    if after not in GOOD:
        also = f" ({before} in the baseline too)" if before not in GOOD else ""
        return Finding("parity", Verdict.REGRESSED, said + also)
    if after is before is Status.ok:
        return Finding("parity", Verdict.PASS, f"error {pair.candidate['parity_worst']:.2g} of its budget")
    if after is Status.ok:
        return Finding("parity", Verdict.IMPROVED, f"ok, was {_said(pair.baseline)}")
    if before is Status.ok:
        verdict = Verdict.INCOMPARABLE if pair.forbidding else Verdict.REGRESSED
        return Finding("parity", verdict, "; ".join(filter(None, (f"was ok, is {said}", _texts(pair.forbidding)))))
    return Finding("parity", Verdict.PASS, f"{said} (was {before})" if after != before else said)


def _said(row: Row) -> str:
    """The status of a row, and the first line of why."""
    detail = "" if is_null(row["detail"]) else str(row["detail"]).strip().split("\n")[0]
    return f"{row['status']}: {detail}" if detail else str(row["status"])


def _texts(some: Iterable[Difference]) -> str:
    return ", ".join(map(str, some))


def _memory(pair: Pair) -> Sequence[Finding]:
    one, two = pair.baseline, pair.candidate
    bytes_of = {
        name: (int(one[column]), int(two[column]))
        for name, column in _MEMORY_COLUMNS.items()
        if not is_null(one[column]) and not is_null(two[column])
    }
    if not bytes_of:
        return []
    others = (some for some in pair.differences if some.what not in TIME_CHANGES)
    forbidding = [some for some in others if some in pair.forbidding or some.what in MEMORY_CHANGES]
    if forbidding:
        return [Finding("memory", Verdict.INCOMPARABLE, _texts(forbidding))]
    on_gpu = not is_null(one["gpu"])
    changed = {name: sizes for name, sizes in bytes_of.items() if _differ(*sizes, on_gpu)}
    reason = ", ".join(f"{name} {before:,} -> {after:,} bytes" for name, (before, after) in changed.items())
    verdict = Verdict.IMPROVED if changed else Verdict.PASS
    if any(after > before for before, after in changed.values()):
        verdict = Verdict.REGRESSED
    same = "the same within what the allocator varies" if on_gpu else "the same to the byte"
    return [Finding("memory", verdict, reason or same)]


def _differ(before: int, after: int, on_gpu: bool) -> bool:
    slack = max(_GPU_SLACK_BYTES, _GPU_SLACK * before) if on_gpu else 0
    return abs(after - before) > slack
