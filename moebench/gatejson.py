"""A gate's verdicts as one JSON document. No torch here.

What is infinite or not known is null: JSON has no infinity, and a reader must not take a limit for a number.
"""

import math
from typing import Any

from moebench.gate import GateResult, Judged, SelfComparison

SCHEMA = 1


def document(result: GateResult) -> dict[str, Any]:
    """The document; docs/gating.md explains its keys."""
    return {
        "schema": SCHEMA,
        "exit_code": result.exit_code,
        "threshold": result.threshold,
        "false_alarms": result.false_alarms,
        "counts": {verdict.value: count for verdict, count in result.counts.items()},
        "differences": [vars(difference) for difference in result.differences],
        "self_comparisons": [_self_comparison(some) for some in result.self_comparisons],
        "jobs": [_job(job) for job in result.jobs],
    }


def _self_comparison(some: SelfComparison) -> dict[str, Any]:
    return {**vars(some), "false_alarm_rate": some.num_alarms / some.num_compared if some.num_compared else None}


def _job(job: Judged) -> dict[str, Any]:
    case_id, backend, dispatcher = job.key
    return {
        "case_id": case_id,
        "backend": backend,
        "dispatcher": dispatcher,
        "verdict": job.verdict.value,
        "findings": [{**vars(finding), "verdict": finding.verdict.value} for finding in job.findings],
        "time": _time(job),
        **{name: _pair(job, name) for name in ("status", "time_ms", "peak_memory_bytes", "saved_memory_bytes")},
        "parity_worst": _pair(job, "parity_worst"),
    }


def _time(job: Judged) -> dict[str, Any] | None:
    if job.time is None:
        return None
    numbers = {
        name: _finite(getattr(job.time, name))
        for name in ("ratio", "low", "high", "p_slower", "p_faster", "smallest_effect")
    }
    numbers["low"] = numbers["low"] or None  # 0 is minus infinity on the logarithmic scale: not known
    return {**numbers, "rounds": list(job.time.rounds)}


def _pair(job: Judged, column: str) -> dict[str, Any]:
    return dict(zip(("baseline", "candidate"), map(_finite, job.cells(column)), strict=True))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
