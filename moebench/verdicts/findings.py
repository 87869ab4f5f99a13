"""Compare the two rows that a baseline and a candidate have of one job, and return the findings.

On a CPU, every byte of difference in memory counts. On a GPU, torch's caching allocator counts the full size of every
cached block that it hands out, and it may hand out blocks of other sizes in the next process. On a GPU, only a
difference that is larger than this variation (`_GPU_SLACK`) counts as a change. The finding on parity follows from the
status of the rows: a job with an error above its budget has the status `mismatch`.

A measure that a side lacks has a finding which says so. Nothing passes because nothing was compared.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moebench.machine.comparability import MEMORY_CHANGES, TIME_CHANGES, Difference, clock_change, node_change
from moebench.machine.units import size_change
from moebench.results.record import GOOD, Status
from moebench.verdicts.times import TimeVerdict, round_medians, starts_of_rounds
from moebench.verdicts.verdict import Severity, Verdict
from moebench.workload.case import Case, Job

Row = Mapping[Hashable, Any]  # a row of a frame of results

_MEMORY_COLUMNS = {"peak": "peak_memory_bytes", "saved for backward": "saved_memory_bytes"}
#: On one H200 (2026-11-23, 58 jobs) two processes of the same code differed in peak memory by up to 0.33% or 0.2 MiB,
#: whichever is more, and in memory saved for backward by up to 0.6% or 1 MiB, whichever is more. A difference up to the
#: larger of `_GPU_SLACK` (as a share) and `_GPU_SLACK_BYTES` does not count.
_GPU_SLACK, _GPU_SLACK_BYTES = 0.01, 2 << 20
#: Flags of a time that says nothing about the code, with the reason. Only results of schema 1 have `impossibly_fast`.
_SPOILED = {"slowed_down": "slowed down by heat or a power brake", "impossibly_fast": "impossibly fast"}
#: Flags that say how a backend behaves, and not under which conditions it was timed. Any other flag that only one side
#: has forbids a comparison.
_HARMLESS = frozenset({"synchronises", "clock_changed", "no_busy_time"})


@dataclass(frozen=True)
class Finding:
    """The verdict on one measure of a job."""

    measure: str  # "time", "busy", "memory" or "parity"; "job" if only one of the results has the job
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Pair:
    """The two rows of a job that is in both results.

    `differences` has the facts that differ between the environments of the two rows. `forbidding` has those of
    `differences` that forbid a comparison. `together` is true if one command measured both rows, which then have the
    same `run_id`.
    """

    baseline: Row
    candidate: Row
    differences: tuple[Difference, ...] = ()
    forbidding: tuple[Difference, ...] = ()
    together: bool = False

    @property
    def both_ok(self) -> bool:
        return is_ok(self.baseline) and is_ok(self.candidate)

    @property
    def other_schema(self) -> str:
        """Why rows of two schemas must not be compared; empty if the rows have the same schema."""
        one, two = self.baseline["schema"], self.candidate["schema"]
        return "" if one == two else f"schema {one} -> {two}: moebench measures differently since; measure both again"

    @property
    def same_measurement(self) -> str:
        """Why the two rows are one measurement, so that a comparison shows nothing; empty if they are two.

        Rows are one measurement if the rounds that both have by number are equal to the last sample, or if all rounds
        of one row follow each other in the other row. The second case is a run that is also a session of the baseline.
        """
        rows = self.baseline, self.candidate
        firsts = [{row["samples_ms"][at] for at in starts_of_rounds(_round_of_each_sample(row))} for row in rows]
        if self.together or firsts[0].isdisjoint(firsts[1]):  # equal rounds begin with equal samples
            return ""
        one, two = map(_samples_of_rounds, rows)
        is_equal = {one[number] == two[number] for number in one.keys() & two.keys()} == {True}
        if is_equal or _is_part([*two.values()], [*one.values()]) or _is_part([*one.values()], [*two.values()]):
            return f"both sides are the same measurement (run {self.candidate['run_id']}); give results of two runs"
        return ""

    @property
    def elsewhere(self) -> str:
        """How the GPU's clock and the node changed, in words; empty if they did not, or are not known."""
        one, two = self.baseline, self.candidate
        changes = clock_change(clock_mhz(one), clock_mhz(two)), node_change(one.get("node"), two.get("node"))
        return "; ".join(filter(None, changes))

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
        why = [*map(str, self.forbidding), *other_l2, *spoiled, *self._flags_of_one_side, self.other_schema]
        return ", ".join(filter(None, why)) or self.same_measurement

    @property
    def _flags_of_one_side(self) -> list[str]:
        one, two = (set(row["flags"]) - _HARMLESS - _SPOILED.keys() for row in (self.baseline, self.candidate))
        sides = [("baseline", flag) for flag in sorted(one - two)] + [("candidate", flag) for flag in sorted(two - one)]
        return [f"only the {side} has the flag {flag}, so the times have other conditions" for side, flag in sides]


def job_of(row: Row) -> Job:
    """Return the job that a row belongs to."""
    fields = {name: None if is_null(row[name]) else row[name] for name in Case.model_fields}
    return Job(case=Case.model_validate(fields), backend=row["backend"], dispatcher=row["dispatcher"])


def is_ok(row: Row) -> bool:
    return bool(row["status"] == Status.ok)


def is_null(cell: Any) -> bool:
    return cell is None or (pd.api.types.is_scalar(cell) and bool(pd.isna(cell)))


def clock_mhz(row: Row) -> float | None:
    """Return the clock of the GPU in a row; None if it is not known."""
    return None if is_null(row["sm_clock_mhz"]) else float(row["sm_clock_mhz"])


def rounds_of(row: Row) -> dict[int, float]:
    """Return the median time of each round of a row in ms, by the round's number; empty for a row without samples.

    If the row has no `sample_rounds`, all samples belong to round 0. A sample that is marked in `sample_marked` ran at
    an unusual GPU clock. Marked samples count only in a round in which all samples are marked.
    """
    samples, marked, numbers = row["samples_ms"], row["sample_marked"], _round_of_each_sample(row)
    if not len(numbers):
        return {}
    if is_null(marked) or not np.any(marked):
        return round_medians(samples, numbers)
    usual = ~np.asarray(marked, bool)
    kept = usual | ~np.isin(numbers, numbers[usual])
    return round_medians(np.asarray(samples)[kept], numbers[kept])


def busy_rounds_of(row: Row) -> dict[int, float]:
    """Return the median of `busy_samples_ms` of each round of a row that has them, by the round's number."""
    samples, rounds = row["busy_samples_ms"], row["busy_sample_rounds"]
    if is_null(samples):
        return {}
    return round_medians(samples, np.zeros(len(samples)) if is_null(rounds) else rounds)


#: The measures that are compared round by round, each with the function that returns the median of each round of a row.
BY_ROUND: Mapping[str, Callable[[Row], dict[int, float]]] = {"time": rounds_of, "busy": busy_rounds_of}


def sessions_of(row: Row) -> dict[int, int]:
    """Return the session of each round of a row. All rounds are of session 0 if the row does not have their sessions.

    A session is one run. A row of several sessions is made by `moebench merge --sessions` and by `moebench baseline`.
    """
    numbers, sessions = _round_of_each_sample(row), row["sample_sessions"]
    if is_null(sessions):
        return dict.fromkeys(sorted(set(numbers.astype(int).tolist())), 0)
    return {int(number): int(session) for number, session in zip(numbers, sessions, strict=True)}


def _round_of_each_sample(row: Row) -> NDArray[Any]:
    samples, rounds = row["samples_ms"], row["sample_rounds"]
    if is_null(samples):
        return np.zeros(0)
    return np.zeros(len(samples)) if is_null(rounds) else np.asarray(rounds)


def _samples_of_rounds(row: Row) -> dict[int, bytes]:
    """Return all samples of each round of a row, by the round's number."""
    numbers = _round_of_each_sample(row)
    samples = np.asarray(row["samples_ms"], float)
    return {int(some): samples[numbers == some].tobytes() for some in np.unique(numbers)}


def _is_part(some: Sequence[Any], all_: Sequence[Any]) -> bool:
    """Return whether the members of `some` follow each other in `all_`."""
    starts = range(len(all_) - len(some) + 1) if some else ()
    return any(all_[start : start + len(some)] == some for start in starts)


def of_baseline_alone() -> tuple[Finding, ...]:
    return (Finding("job", Verdict.MISSING, "in the baseline, not in the candidate"),)


def of_candidate_alone(row: Row) -> tuple[Finding, ...]:
    new = Finding("job", Verdict.NEW, "in the candidate, not in the baseline")
    wrong = Status(row["status"]) not in GOOD
    return (new, Finding("parity", Verdict.REGRESSED, _said(row))) if wrong else (new,)


def of_pair(pair: Pair, time: TimeVerdict | None, busy: TimeVerdict | None = None) -> tuple[Finding, ...]:
    """Return the findings on time, on the GPU's own time, on memory and on parity of one job.

    If only the candidate is ok, the finding on time says that there is nothing to compare with. If the candidate is not
    ok, the finding on parity says why. `time` and `busy` are None if the times of the two rows must not be compared.
    `busy` is also None if a side does not have the GPU's own time.
    """
    if not is_ok(pair.candidate):
        return (_parity(pair),)
    if not is_ok(pair.baseline):
        alone = f"the baseline has no time and no memory ({pair.baseline['status']}), so there was nothing to compare"
        return Finding("time", Verdict.UNMEASURED, alone), _parity(pair)
    return _time(pair, time, busy), *_busy(pair, busy), _memory(pair), _parity(pair)


def _time(pair: Pair, time: TimeVerdict | None, busy: TimeVerdict | None) -> Finding:
    if time is None:
        return Finding("time", Verdict.INCOMPARABLE, pair.why_incomparable)
    reasons = [time.reason, pair.elsewhere]
    if busy is not None and time.verdict.severity in (Severity.FAILED, Severity.UNDECIDED):
        reasons.append(f"the GPU's own time (busy_ms): {busy.verdict}")
    return Finding("time", time.verdict, "; ".join(filter(None, reasons)))


def _busy(pair: Pair, busy: TimeVerdict | None) -> tuple[Finding, ...]:
    """Return the finding on the GPU's own time, or none if no side has it."""
    before, after = (bool(busy_rounds_of(row)) for row in (pair.baseline, pair.candidate))
    if before and after:
        verdict, reason = Verdict.INCOMPARABLE, pair.why_incomparable
        if busy is not None:
            verdict, reason = busy.verdict, "; ".join(filter(None, (busy.reason, pair.elsewhere)))
    elif after:
        verdict, reason = Verdict.UNMEASURED, "the baseline has no busy_ms, so nothing was compared; measure it again"
    elif before and "synchronises" in pair.candidate["flags"]:
        verdict, reason = Verdict.INCONCLUSIVE, "only the baseline has busy_ms; measure the candidate again"
    elif before:
        verdict, reason = Verdict.UNMEASURED, "the candidate's call does not wait for the GPU: nothing was compared"
    else:
        return ()
    return (Finding("busy", verdict, reason),)


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
        return Finding(
            "parity", verdict, "; ".join(filter(None, (f"was ok, is {said}", ", ".join(map(str, pair.forbidding)))))
        )
    was = f" (was {before})" if after != before else ""
    return Finding("parity", Verdict.UNMEASURED, f"neither side ran, so there was nothing to compare: {said}{was}")


def _said(row: Row) -> str:
    """Return the status of a row and the first line of its detail."""
    detail = "" if is_null(row["detail"]) else str(row["detail"]).strip().split("\n")[0]
    return f"{row['status']}: {detail}" if detail else str(row["status"])


def _memory(pair: Pair) -> Finding:
    one, two = pair.baseline, pair.candidate
    cells = {name: (one[column], two[column]) for name, column in _MEMORY_COLUMNS.items()}
    lost = [name for name, (before, after) in cells.items() if not is_null(before) and is_null(after)]
    if lost:
        return Finding("memory", Verdict.INCONCLUSIVE, f"only the baseline has a figure of memory: {', '.join(lost)}")
    bytes_of = {name: (int(before), int(after)) for name, (before, after) in cells.items() if not is_null(before)}
    if not bytes_of:
        return Finding("memory", Verdict.UNMEASURED, "the baseline has no figure of memory, so nothing was compared")
    others = [some for some in pair.differences if some.what not in TIME_CHANGES]
    forbidding = [some for some in others if some in pair.forbidding or some.what in MEMORY_CHANGES]
    why = ", ".join(map(str, forbidding)) or pair.other_schema
    if why:
        return Finding("memory", Verdict.INCOMPARABLE, why)
    on_gpu = not is_null(one["gpu"])
    changed = {name: both for name, both in bytes_of.items() if _differ(*both, on_gpu)}
    reason = ", ".join(f"{name} {size_change(before, after)}" for name, (before, after) in changed.items())
    verdict = Verdict.IMPROVED if changed else Verdict.PASS
    if any(after > before for before, after in changed.values()):
        verdict = Verdict.REGRESSED
    same = "the same within the allocator's usual variation" if on_gpu else "the same to the byte"
    return Finding("memory", verdict, reason or same)


def _differ(before: int, after: int, on_gpu: bool) -> bool:
    slack = max(_GPU_SLACK_BYTES, _GPU_SLACK * before) if on_gpu else 0
    return abs(after - before) > slack
