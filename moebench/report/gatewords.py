"""Write the numbers of a gate as text. The terminal table, the annotations and the summary use the same texts."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from moebench.machine.units import size
from moebench.verdicts.gate import GateResult, Judged
from moebench.verdicts.times import TimeVerdict
from moebench.verdicts.verdict import Severity, Verdict

NONE = "-"
#: A ratio of times or a slowdown above this number is shown as not known. It would say nothing.
_LARGEST = 100.0


def total(result: GateResult) -> str:
    """Return the number of jobs with each verdict, such as `2 REGRESSED, 105 PASS`."""
    return ", ".join(f"{count} {verdict}" for verdict, count in result.counts.items())


def change(job: Judged) -> str:
    """Return the change of the time with its interval, such as `+3.1% (+2.8 to +3.5)`. A change above 0 is slower."""
    return _change(job.time)


def busy_change(job: Judged) -> str:
    """Return the change of the GPU's own time with its interval, as `change` does it."""
    return _change(job.busy)


def has_busy(jobs: Iterable[Judged]) -> bool:
    """Whether the GPU's own time was compared in any of the jobs."""
    return any(job.busy is not None for job in jobs)


def _change(time: TimeVerdict | None) -> str:
    if time is None or math.isnan(time.ratio):
        return NONE
    low, high = (f"{some - 1:+.1%}".rstrip("%") for some in (time.low, time.high))
    if time.high > _LARGEST or time.low < 1 / _LARGEST:
        return f"{time.ratio - 1:+.1%}"
    return f"{time.ratio - 1:+.1%} ({low} to {high})"


def smallest_effect(job: Judged) -> str:
    """Return the smallest slowdown that the gate would have found, such as `2.1%`, or `none`."""
    if job.time is None:
        return NONE
    return f"{job.time.smallest_effect:.1%}" if job.time.smallest_effect < _LARGEST else "none"


def labelled(job: Judged) -> str:
    """Return the verdict on a job with the measures that have it, such as `REGRESSED time, memory`."""
    measures = [one.measure for one in job.findings if one.verdict is job.verdict and one.measure != "job"]
    return f"{job.verdict}{' ' * bool(measures)}{', '.join(measures)}" if job.verdict is not Verdict.PASS else "PASS"


def memory_change(job: Judged) -> str:
    """Return the change of peak memory, or the change of saved memory if the peak is equal: `=` or `+1.20%`."""
    changes = [
        _relative(*job.cells(column))
        for column in ("peak_memory_bytes", "saved_memory_bytes")
        if None not in job.cells(column)
    ]
    return next((text for text in changes if text != "="), "=") if changes else NONE


def _relative(before: Any, after: Any) -> str:
    if before == after:
        return "="
    return f"{after / before - 1:+.2%}" if before else f"+{size(after)}"


def parity_change(job: Judged) -> str:
    """Return the parity error divided by its budget: `0.31`, or `0.31 -> 0.35` if it changed.

    For a side with another status than ok, the status replaces the error: `0.31 -> mismatch`.
    """
    statuses = ["none" if status is None else str(status) for status in job.cells("status")]
    errors = [NONE if error is None else f"{error:.2g}" for error in job.cells("parity_worst")]
    both = [error if status == "ok" else status for status, error in zip(statuses, errors, strict=True)]
    return both[0] if both[0] == both[1] else " -> ".join(both)


def in_verdict_order(result: GateResult) -> list[Judged]:
    """Return the jobs, the worst verdict first."""
    return sorted(result.jobs, key=lambda job: job.verdict.rank)


def reasons(jobs: Sequence[Judged], of: Collection[Severity]) -> dict[tuple[Verdict, str], str]:
    """Return the names of the jobs that have the same verdict for the same reason, by verdict and reason.

    Only findings with a severity in `of` count. The worst verdict is first.
    """
    jobs_of: dict[tuple[Verdict, str], list[str]] = {}
    for job in jobs:
        for finding in job.findings:
            if finding.verdict.severity in of:
                why = finding.verdict, f"{finding.measure}: {finding.reason}"
                jobs_of.setdefault(why, []).append(f"{job.backend} on {job.key.case_id}")
    worst_first = sorted(jobs_of.items(), key=lambda item: item[0][0].rank)
    return {why: _some(names) for why, names in worst_first}


def _some(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + f" and {rest} more" * (rest > 0)
