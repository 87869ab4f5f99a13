"""Make one row of the rows that several rounds have of one job. A round measures all jobs once, in fresh processes."""

from collections.abc import Sequence
from typing import Any

from moebench.results.columns import COMBINE
from moebench.results.record import COLUMN_OF, Record, Status
from moebench.results.stats import center_of_rounds

#: If the rounds of a job ended with different statuses, the job's row has the status that comes first here.
WORST_ROUND_FIRST = (
    *(Status.mismatch, Status.crash, Status.error, Status.timeout, Status.oom, Status.unsupported),
    Status.ok,
)


def merged_rounds(rows: Sequence[Record]) -> Record:
    """Return one row for a job, made of the job's row in each round.

    The time is the median of the rounds' medians, and the 95% confidence interval comes from how much the medians vary
    (`stats.center_of_rounds`). `tokens_per_s`, `tflops` and `roofline_fraction` are computed from the time. The
    declaration of every other column says how its rounds combine. If any round failed, the result is the row of the
    worst round. Its `detail` then names the rounds that ended like this, and its `job_s` is the sum over all rounds.
    The row has the lowest schema of its rounds.
    """
    if len(rows) == 1:
        return rows[0]
    rows = sorted(rows, key=lambda row: row.round or 0)
    row = min(rows, key=lambda row: (WORST_ROUND_FIRST.index(row.status), -(row.parity_worst or 0.0)))
    schema = min(row.schema_version for row in rows)  # they differ if a later moebench resumed the run
    together: dict[str, Any] = {"round": None, "num_rounds": len(rows), "schema": schema}
    if row.status is Status.ok:
        together |= {name: _combined(name, rows) for name, column in COLUMN_OF.items() if column.rounds in COMBINE}
        together |= _speed(rows)
    else:
        together |= {"detail": _detail(row, rows), "job_s": _combined("job_s", rows)}
    return Record.model_validate(row.model_dump(by_alias=True) | together)


def _combined(name: str, rows: Sequence[Record]) -> Any:
    """Return one value of a column, made of the rounds' values as the column declares; None if no round has a value."""
    values = [value for row in rows if (value := getattr(row, name)) is not None]
    return COMBINE[COLUMN_OF[name].rounds](values) if values else None


def _speed(rows: Sequence[Record]) -> dict[str, Any]:
    """Return the time over all rounds, and the columns that are computed from it."""
    time_ms, low, high = center_of_rounds([row.time_ms for row in rows if row.time_ms is not None])
    first = rows[0]
    assert first.time_ms is not None, "a row with status ok has a time"
    work = {name: value * first.time_ms for name in ("tokens_per_s", "tflops") if (value := getattr(first, name))}
    if (bound_ms := _combined("roofline_ms", rows)) is not None:
        work["roofline_fraction"] = bound_ms
    found = {"time_ms": time_ms, "time_ms_low": low, "time_ms_high": high}
    return {**found, **{name: amount / time_ms for name, amount in work.items()}}


def _detail(worst: Record, rows: Sequence[Record]) -> str | None:
    """Return why the job failed and, unless it failed in every round, in which rounds."""
    alike = [str(row.round) for row in rows if row.status is worst.status]
    return worst.detail if len(alike) == len(rows) else f"round {', '.join(alike)} of {len(rows)}: {worst.detail}"
