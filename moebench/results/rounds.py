"""Make one row of the rows that several rounds have of one job, or of the rows that several sessions have.

A round measures all jobs once, in fresh processes. A session is a run with its rounds.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from moebench.errors import ResultsError
from moebench.results.columns import COMBINE
from moebench.results.record import COLUMN_OF, Record, Status
from moebench.results.stats import center_of_rounds

#: If the rounds of a job ended with different statuses, the job's row has the status that comes first here.
WORST_ROUND_FIRST = (
    *(Status.mismatch, Status.crash, Status.error, Status.timeout, Status.oom, Status.unsupported),
    Status.ok,
)
#: The flag of a row whose job has further rounds of another environment, which the row leaves out.
OTHER_ENVIRONMENT = "other_environment"


def merged_rounds(rows: Sequence[Record]) -> Record:
    """Return one row for a job, made of the job's row in each round.

    The time is the median of the rounds' medians, and the 95% confidence interval comes from how much the medians vary
    (`stats.center_of_rounds`). `tokens_per_s`, `tflops` and `roofline_fraction` are computed from the time. The
    declaration of every other column says how its rounds combine. If any round failed, the result is the row of the
    worst round. Its `detail` then names the rounds that ended like this, and its `job_s` is the sum over all rounds.
    The row has the lowest schema of its rounds.

    Times of two environments make no common time. If a run was resumed in another environment, the row has the rounds
    of the environment of the last row, and the flag `OTHER_ENVIRONMENT`.
    """
    if len(rows) == 1:
        return rows[0]
    if all(row.status is Status.ok for row in rows) and len({row.env_id for row in rows}) > 1:
        alike = merged_rounds([row for row in rows if row.env_id == rows[-1].env_id])
        return alike.model_copy(update={"flags": (*alike.flags, OTHER_ENVIRONMENT)})
    rows = sorted(rows, key=lambda row: row.round or 0)
    row = min(rows, key=lambda row: (WORST_ROUND_FIRST.index(row.status), -(row.parity_worst or 0.0)))
    schema = min(row.schema_version for row in rows)  # they differ if a later moebench resumed the run
    together: dict[str, Any] = {"round": None, "num_rounds": len(rows), "schema": schema}
    if row.status is Status.ok:
        together |= _all_combined(rows)
        together |= _speed(rows, [row.time_ms for row in rows if row.time_ms is not None])
        together |= _busy(rows, [row.busy_ms for row in rows if row.busy_ms is not None])
    else:
        together |= {"detail": _detail(row, rows), "job_s": _combined("job_s", rows)}
    return Record.model_validate(row.model_dump(by_alias=True, exclude=set(together)) | together)


def merged_sessions(rows: Sequence[Record]) -> Record:
    """Return one row for a job, made of the job's rows in several runs. Each row's rounds become sessions of their own.

    If a row is not ok, the result is the row of the worst run. Raises ResultsError if the rows are of several
    environments or schemas, or if two rows are of one run.
    """
    for name in ("env_id", "schema_version"):
        found = sorted({str(getattr(row, name)) for row in rows})
        if len(found) > 1:
            raise ResultsError(
                f"{rows[0].backend} on {rows[0].case_id}: the runs have several values of {name} "
                f"({', '.join(found)}), but sessions must be measured alike; give runs of one machine and moebench"
            )
    runs = [run for row in rows for run in row.run_id.split(" | ")]
    twice = sorted({run for run in runs if runs.count(run) > 1})
    if twice:
        raise ResultsError(f"run {twice[0]} is given twice, but each session must be a run of its own")
    worst = min(rows, key=lambda row: (WORST_ROUND_FIRST.index(row.status), -(row.parity_worst or 0.0)))
    if worst.status is not Status.ok:
        return worst
    together = _all_combined(rows)
    numbered: dict[str, list[int]] = {"sample_rounds": [], "sample_sessions": []}
    busy_rounds: list[int] = []
    for row in rows:
        for name, so_far in numbered.items():
            own = getattr(row, name) or (0,) * len(row.samples_ms or ())
            new = _renumbered(own, max(so_far, default=-1) + 1)
            so_far += [new[number] for number in own]
            if name == "sample_rounds":
                busy_rounds += [new[number] for number in _busy_rounds(row)]
    marks = [row.sample_marked or (False,) * len(row.samples_ms or ()) for row in rows]
    together |= {name: tuple(numbers) for name, numbers in numbered.items()}
    together |= {"busy_sample_rounds": tuple(busy_rounds) or None}
    together |= {"sample_marked": tuple(chain.from_iterable(marks)), "num_rounds": sum(row.num_rounds for row in rows)}
    together |= _speed(rows, [median for row in rows for median in _medians(row)])
    together |= _busy(rows, [median for row in rows for median in _busy_medians(row)])
    return Record.model_validate(worst.model_dump(by_alias=True) | together | {"round": None})


def _renumbered(numbers: Sequence[int], start: int) -> dict[int, int]:
    """Return the new number of each number: `start` for the first number that occurs, `start` + 1 for the next."""
    return {number: position for position, number in enumerate(dict.fromkeys(numbers), start)}


def _busy_rounds(row: Record) -> Sequence[int]:
    return row.busy_sample_rounds or (0,) * len(row.busy_samples_ms or ())


def _busy_medians(row: Record) -> list[float]:
    """Return the median of the GPU's own time of each round that has it."""
    samples, rounds = np.asarray(row.busy_samples_ms or ()), np.asarray(_busy_rounds(row))
    return [float(np.median(samples[rounds == number])) for number in np.unique(rounds)]


def _medians(row: Record) -> list[float]:
    """Return the median of each round's samples that are not marked, or of all samples of a round if all are marked."""
    samples = np.asarray(row.samples_ms)
    rounds = np.asarray(row.sample_rounds or (0,) * len(samples))
    usual = ~np.asarray(row.sample_marked or (False,) * len(samples))
    kept = usual | ~np.isin(rounds, rounds[usual])
    return [float(np.median(samples[kept & (rounds == number)])) for number in np.unique(rounds)]


#: The function that makes one value of the rounds' values, for each column that declares one.
_COMBINE = {name: COMBINE[column.rounds] for name, column in COLUMN_OF.items() if column.rounds in COMBINE}


def _all_combined(rows: Sequence[Record]) -> dict[str, Any]:
    """Return one value for each column that declares how the rounds' values combine, as `_combined` does."""
    cells = [vars(row) for row in rows]
    found = {}
    for name, combine in _COMBINE.items():
        values = [value for of_row in cells if (value := of_row[name]) is not None]
        found[name] = combine(values) if values else None
    return found


def _combined(name: str, rows: Sequence[Record]) -> Any:
    """Return one value of a column, made of the rounds' values as the column declares; None if no round has a value."""
    values = [value for row in rows if (value := getattr(row, name)) is not None]
    return COMBINE[COLUMN_OF[name].rounds](values) if values else None


def _speed(rows: Sequence[Record], medians: Sequence[float]) -> dict[str, Any]:
    """Return the time over all rounds, and the columns that are computed from it. `medians` has one time per round."""
    time_ms, low, high = center_of_rounds(medians)
    first = rows[0]
    assert first.time_ms is not None, "a row with status ok has a time"
    work = {name: value * first.time_ms for name in ("tokens_per_s", "tflops") if (value := getattr(first, name))}
    if (bound_ms := _combined("roofline_ms", rows)) is not None:
        work["roofline_fraction"] = bound_ms
    found = {"time_ms": time_ms, "time_ms_low": low, "time_ms_high": high}
    return {**found, **{name: amount / time_ms for name, amount in work.items()}}


def _busy(rows: Sequence[Record], medians: Sequence[float]) -> dict[str, Any]:
    """Return the GPU's own time over all rounds that have it. `medians` has one time per such round."""
    names = ("busy_ms", "busy_ms_low", "busy_ms_high")
    if len(medians) > 1:
        return dict(zip(names, center_of_rounds(medians), strict=True))
    only = next((row for row in rows if row.busy_ms is not None), rows[0])
    return {name: getattr(only, name) for name in names}


def _detail(worst: Record, rows: Sequence[Record]) -> str | None:
    """Return why the job failed and, unless it failed in every round, in which rounds."""
    alike = [str(row.round) for row in rows if row.status is worst.status]
    return worst.detail if len(alike) == len(rows) else f"round {', '.join(alike)} of {len(rows)}: {worst.detail}"
