"""Compare the two rows that a baseline and a candidate have of one job, and return the findings.

On a CPU, every byte of difference in memory counts. On a GPU, torch's caching allocator counts the full size of every
cached block that it hands out, and it may hand out blocks of other sizes in the next process. On a GPU, only a
difference that is larger than this variation (`_GPU_SLACK`) counts as a change. The finding on parity follows from the
status of the rows: a job with an error above its budget has the status `mismatch`.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moebench.machine.comparability import MEMORY_CHANGES, TIME_CHANGES, Difference
from moebench.results.record import GOOD, Status
from moebench.verdicts.times import TimeVerdict, round_medians
from moebench.verdicts.verdict import Verdict
from moebench.workload.case import Case, Job

Row = Mapping[Hashable, Any]  # a row of a frame of results

_MEMORY_COLUMNS = {"peak": "peak_memory_bytes", "saved for backward": "saved_memory_bytes"}
#: On one H200 (2026-11-23, 58 jobs) two processes of the same code differed in peak memory by up to 0.33% or 0.2 MiB,
#: whichever is more, and in memory saved for backward by up to 0.6% or 1 MiB, whichever is more. A difference up to the
#: larger of `_GPU_SLACK` (as a share) and `_GPU_SLACK_BYTES` does not count.
_GPU_SLACK, _GPU_SLACK_BYTES = 0.01, 2 << 20
#: Flags of a time that says nothing about the code, with the reason. Only results of schema 1 have `impossibly_fast`.
_SPOILED = {"slowed_down": "slowed down by heat or a power brake", "impossibly_fast": "impossibly fast"}


@dataclass(frozen=True)
class Finding:
    """The verdict on one measure of a job."""

    measure: str  # "time", "memory" or "parity"; "job" if only one of the results has the job
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Pair:
    """The two rows of a job that is in both results.

    `differences` has the facts that differ between the environments of the two rows. `forbidding` has those of
    `differences` that forbid a comparison.
    """

    baseline: Row
    candidate: Row
    differences: tuple[Difference, ...] = ()
    forbidding: tuple[Difference, ...] = ()

    @property
    def both_ok(self) -> bool:
        return is_ok(self.baseline) and is_ok(self.candidate)

    @property
    def other_schema(self) -> str:
        """Why rows of two schemas must not be compared; empty if the rows have the same schema."""
        one, two = self.baseline["schema"], self.candidate["schema"]
        return "" if one == two else f"schema {one} -> {two}: moebench measures differently since; measure both again"

    @property
    def why_incomparable(self) -> str:
        """Why the times of the two rows must not be compared; empty if the times may be compared."""
        one, two = (row["l2"] for row in (self.baseline, self.candidate))
        other_l2 = [] if is_null(one) or is_null(two) or one == two else [f"L2 {one} -> {two}"]
        spoiled = [
            f"{side} {why}; measure it again"
            for side, row in (("baseline", self.baseline), ("candidate", self.candidate))
            for flag, why in _SPOILED.items()
            if flag in row["flags"]
        ]
        return ", ".join(filter(None, [*map(str, self.forbidding), *other_l2, *spoiled, self.other_schema]))


def job_of(row: Row) -> Job:
    """Return the job that a row belongs to."""
    fields = {name: None if is_null(row[name]) else row[name] for name in Case.model_fields}
    return Job(case=Case.model_validate(fields), backend=row["backend"], dispatcher=row["dispatcher"])


def is_ok(row: Row) -> bool:
    return bool(row["status"] == Status.ok)


def is_null(cell: Any) -> bool:
    return cell is None or (pd.api.types.is_scalar(cell) and bool(pd.isna(cell)))


def rounds_of(row: Row) -> dict[int, float]:
    """Return the median time of each round of a row in ms, by the round's number; empty for a row without samples.

    If the row has no `sample_rounds`, all samples belong to round 0. A sample that is marked in `sample_marked` ran at
    an unusual GPU clock. Marked samples count only in a round in which all samples are marked.
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
    """Return the findings on time, memory and parity of one job, or only on parity if one of its rows is not ok.

    `time` is None if the times of the two rows must not be compared.
    """
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
        also = f" (also {before} in the baseline)" if before not in GOOD else ""
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
    """Return the status of a row and the first line of its detail."""
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
    if forbidding or pair.other_schema:
        return [Finding("memory", Verdict.INCOMPARABLE, _texts(forbidding) or pair.other_schema)]
    on_gpu = not is_null(one["gpu"])
    changed = {name: sizes for name, sizes in bytes_of.items() if _differ(*sizes, on_gpu)}
    reason = ", ".join(f"{name} {before:,} -> {after:,} bytes" for name, (before, after) in changed.items())
    verdict = Verdict.IMPROVED if changed else Verdict.PASS
    if any(after > before for before, after in changed.values()):
        verdict = Verdict.REGRESSED
    same = "the same within the allocator's usual variation" if on_gpu else "the same to the byte"
    return [Finding("memory", verdict, reason or same)]


def _differ(before: int, after: int, on_gpu: bool) -> bool:
    slack = max(_GPU_SLACK_BYTES, _GPU_SLACK * before) if on_gpu else 0
    return abs(after - before) > slack
