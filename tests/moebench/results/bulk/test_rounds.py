"""Rounds that are merged by columns make the rows that `merged_rounds` makes of one job after the other."""

import random
from typing import Any

import numpy as np
import pytest
from pandas.testing import assert_frame_equal

from moebench.results.bulk import tables
from moebench.results.columns import COMBINE, LONGEST_MS
from moebench.results.frame import to_frame
from moebench.results.record import COLUMN_OF, Record, Status
from tests.moebench.results.test_frame import ALL, bad, ok

#: Columns in which a job has a value in all rounds or in none.
TOGETHER = ("busy_ms", "busy_ms_low", "busy_ms_high", "busy_samples_ms", "busy_sample_rounds")
FIXED = ("num_rounds", "sample_sessions", "samples_ms", "sample_rounds", "sample_marked", *TOGETHER)


def other(value: Any, draw: random.Random) -> Any:
    """Return a value like `value`."""
    match value:
        case bool():
            return draw.random() < 0.5
        case float():
            return value * draw.uniform(0.9, 1.1)
        case int():
            return value + draw.randrange(3)
        case str():
            return draw.choice([value, value, f"{value} or other"])
        case dict():
            return {name: other(error, draw) for name, error in value.items() if draw.random() < 0.9}
    return tuple(draw.sample(value, len(value)))


def of_a_round(number: int, draw: random.Random, has_busy: bool, missing: float) -> dict[str, Any]:
    cells = {name: other(value, draw) for name, value in ALL.items() if name not in FIXED}
    for name in sorted(cells):
        if draw.random() < missing:
            del cells[name]
    cells |= {"l2": "cold", "flags": draw.sample(("clocks", "drift", "a;b"), draw.randrange(3))}
    for name in {"parity_errors"} & cells.keys():
        cells[name] = cells[name] or None
    count = draw.randrange(1, 5)
    cells |= {"time_ms_low": 1.0, "time_ms": draw.uniform(1.45, 1.55), "time_ms_high": 1.75}
    cells["parity_worst"] = draw.choice([0.25, 0.25, 0.5, 1.0])
    cells["samples_ms"] = [draw.random() + 1 for _ in range(count)]
    cells["sample_rounds"] = (number,) * count
    cells["sample_marked"] = [draw.random() < 0.3 for _ in range(count)] if has_busy else None
    if has_busy:
        cells |= {"busy_ms": draw.uniform(1.05, 1.2), "busy_samples_ms": [1.0], "busy_sample_rounds": (number,)}
    else:
        cells |= dict.fromkeys(TOGETHER)
    return cells


def records(seed: int, num_jobs: int, num_rounds: int, missing: float) -> list[Record]:
    """Return records of jobs, round by round in a random order. A few rounds failed, or are of another environment."""
    draw = random.Random(seed)
    has_busy = {job: draw.random() < 0.5 for job in range(num_jobs)}
    rows = []
    for number in draw.sample(range(num_rounds), num_rounds):
        for job in draw.sample(range(num_jobs), num_jobs):
            if draw.random() < 0.02:
                rows.append(bad(Status.oom, f"backend{job}", round=number))
                continue
            env_id = "other" if draw.random() < 0.02 else "e"
            row = ok(f"backend{job}", round=number, **of_a_round(number, draw, has_busy[job], missing))
            rows.append(row.model_copy(update={"env_id": env_id}))
    return rows


@pytest.mark.parametrize(("num_rounds", "missing"), [(2, 0.0), (3, 0.3), (4, 0.02), (7, 0.1)])
def test_the_rows_are_those_that_one_job_after_the_other_gives(
    num_rounds: int, missing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = records(num_rounds, 40, num_rounds, missing)
    by_columns = to_frame(rows)
    monkeypatch.setattr(tables, "can_combine", lambda table: np.zeros(len(table), bool))
    monkeypatch.setattr(tables, "combined", None)
    one_by_one = to_frame(rows)
    assert_frame_equal(by_columns, one_by_one, check_exact=True)
    assert by_columns.map(repr).equals(one_by_one.map(repr)), "to the last bit"


def test_every_column_that_rounds_combine_differs_between_rounds() -> None:
    """The test above could not fail for a column that has the same value in all rounds of each job."""
    found: dict[str, set[str]] = {}
    for row in records(3, 4, 4, 0.0):
        for name in COLUMN_OF:
            found.setdefault(name, set()).add(repr(getattr(row, name)))
    same = {name for name, column in COLUMN_OF.items() if column.rounds in COMBINE and len(found[name]) == 1}
    assert same <= {"detail", "env_id", "l2", "run_id", "sample_sessions"}


def test_a_sum_that_no_column_holds_is_told_as_for_one_job() -> None:
    half = [ok(round=number, job_s=0.75 * LONGEST_MS) for number in range(2)]
    with pytest.raises(ValueError, match="job_s"):
        to_frame(half)
    count = [ok(round=number, num_samples=2**62) for number in range(2)]
    with pytest.raises(ValueError, match="num_samples"):
        to_frame(count)


def test_of_a_round_that_was_measured_again_the_later_record_counts() -> None:
    rows = [ok(round=0, time_ms=9.0), ok(round=1, time_ms=1.0), ok("te", round=0), ok(round=0, time_ms=1.5)]
    frame = to_frame(rows)
    assert frame["backend"].tolist() == ["loop", "te"]
    assert (frame["time_ms"].tolist(), frame["num_rounds"].tolist()) == ([1.25, 1.5], [2, 1])
