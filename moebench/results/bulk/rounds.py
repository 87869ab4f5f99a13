"""Make one row of the rows that several rounds have of each job, for all jobs at once.

`moebench.results.rounds.merged_rounds` says what the row is. This module computes the same for the jobs that were
measured in every round, with arrays that have one row for each job and one column for each round.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from moebench.results.bulk.errors import cell_of_errors
from moebench.results.bulk.schema import ALIASES, ARROW_SCHEMA
from moebench.results.columns import COMBINE, Rounds
from moebench.results.record import COLUMN_OF, Status
from moebench.results.stats import centers_of_rounds
from moebench.workload.case import KEY

_WORK = ("tokens_per_s", "tflops")
_BUSY = ("busy_ms", "busy_ms_low", "busy_ms_high")


def rows_of_jobs(table: Any) -> list[list[int]]:
    """Return the numbers of the rows of each job, for the jobs in the order in which they first appear.

    If a job has several rows of one round, only the last one is among them, in the place of the first.
    """
    jobs: dict[tuple[Any, ...], dict[int | None, int]] = {}
    keys = zip(*(table[name].to_pylist() for name in (*KEY, "check")), strict=True)
    for row, (key, number) in enumerate(zip(keys, table["round"].to_pylist(), strict=True)):
        jobs.setdefault(key, {})[number] = row
    return [list(rounds.values()) for rounds in jobs.values()]


def can_combine(table: Any) -> np.ndarray:
    """Return which rows `combined` takes: those with status ok and a time."""
    is_ok: np.ndarray = pc.equal(table["status"], Status.ok.value).to_numpy()
    for name in ("time_ms", "parity_worst"):
        is_ok = is_ok & table[name].is_valid().to_numpy()
    return is_ok


def combined(table: Any, rows: np.ndarray) -> Any:
    """Return a table with one row for each job. `rows` has the numbers of a job's rows in each of its rows.

    The rows of a job are in the order of rounds, of one environment, and as `can_combine` demands. Either all rows of a
    job have the GPU's own time, or none has it.
    """
    shape = rows.shape

    def cells_of(name: str) -> Any:
        return table[name].combine_chunks().take(pa.array(rows.ravel()))

    def numbers_of(name: str) -> np.ndarray:
        numbers: np.ndarray = cells_of(name).to_numpy(zero_copy_only=False).astype(float).reshape(shape)
        return numbers

    worst = numbers_of("parity_worst").argmax(axis=1)
    worst_rows = pa.array(rows[np.arange(len(rows)), worst])
    found = {}
    for name, column in COLUMN_OF.items():
        if column.rounds in COMBINE:
            found[name] = _combined(name, column.rounds, cells_of(name), shape[1])
        else:
            found[ALIASES[name]] = table[ALIASES[name]].combine_chunks().take(worst_rows)
    found["round"] = pa.nulls(len(rows), pa.int64())
    found["num_rounds"] = pa.array(np.full(len(rows), shape[1]))
    found["schema"] = pa.array(cells_of("schema").to_numpy().reshape(shape).min(axis=1))
    times = numbers_of("time_ms")
    centers = centers_of_rounds(times)
    found |= dict(zip(("time_ms", "time_ms_low", "time_ms_high"), map(pa.array, centers), strict=True))
    for name in _WORK:
        first = numbers_of(name)[:, 0]
        has_work = ~np.isnan(first) & (first != 0)
        found[name] = _where(has_work, first * times[:, 0] / centers[0], found[name])
    bound_ms = found["roofline_ms"].to_numpy(zero_copy_only=False).astype(float)
    found["roofline_fraction"] = _where(~np.isnan(bound_ms), bound_ms / centers[0], found["roofline_fraction"])
    found |= _busy(numbers_of("busy_ms"))
    return pa.table([found[name] for name in ARROW_SCHEMA.names], schema=ARROW_SCHEMA)


def _where(condition: np.ndarray, values: np.ndarray, others: Any) -> Any:
    """Return an Arrow array with those of the values for which the condition holds, else with those of the others."""
    numbers = np.where(condition, values, others.to_numpy(zero_copy_only=False).astype(float))
    return pa.array(numbers, pa.float64(), from_pandas=True)


def _busy(times: np.ndarray) -> dict[str, Any]:
    has_time = ~np.isnan(times[:, 0])
    centers = np.full((3, len(times)), np.nan)
    if has_time.any():
        centers[:, has_time] = centers_of_rounds(times[has_time])
    return {name: pa.array(some, from_pandas=True) for name, some in zip(_BUSY, centers, strict=True)}


def _combined(name: str, rule: Rounds, cells: Any, num_rounds: int) -> Any:
    """Return one cell for each job."""
    if cells.null_count == len(cells):
        return cells[: len(cells) // num_rounds]
    if name == "parity_errors":
        return _of_errors(cells.to_pylist(), num_rounds)
    if rule is Rounds.SAMPLES:
        return _joined(cells, num_rounds)
    if rule is Rounds.EVERY and pa.types.is_string(cells.type):
        return _every(cells, num_rounds)
    of_all = _OF_ALL.get(rule)
    if of_all is None or pa.types.is_list(cells.type):
        return pa.array(_one_by_one(rule, _groups(cells.to_pylist(), num_rounds)), cells.type)
    is_there = cells.is_valid().to_numpy(zero_copy_only=False).reshape(-1, num_rounds)
    whole, none = is_there.all(axis=1), ~is_there.any(axis=1)
    if not (whole | none).all():
        return pa.array(_one_by_one(rule, _groups(cells.to_pylist(), num_rounds)), cells.type)
    numbers = cells.drop_null().to_numpy(zero_copy_only=False).reshape(-1, num_rounds)
    result = np.zeros(len(whole), numbers.dtype)
    result[whole] = of_all(numbers)
    return pa.array(result, cells.type, mask=none)


def _lower_median(numbers: np.ndarray) -> np.ndarray:
    middle: np.ndarray = np.sort(numbers, axis=1)[:, (numbers.shape[1] - 1) // 2]
    return middle


def _median(numbers: np.ndarray) -> np.ndarray:
    ordered, count = np.sort(numbers, axis=1), numbers.shape[1]
    middle: np.ndarray = ordered[:, count // 2]
    return middle if count % 2 else (ordered[:, count // 2 - 1] + middle) / 2


#: The rules that arrays of numbers follow at once, with the same results as the functions of COMBINE.
_OF_ALL: dict[Rounds, Callable[[np.ndarray], np.ndarray]] = {
    Rounds.WORST: lambda numbers: numbers.max(axis=1),
    Rounds.MEDIAN: _median,
    Rounds.LOWER_MEDIAN: _lower_median,
    Rounds.ALL: lambda numbers: np.asarray(numbers.all(axis=1)),
}


def _groups(values: list[Any], num_rounds: int) -> list[list[Any]]:
    return [values[start : start + num_rounds] for start in range(0, len(values), num_rounds)]


def _one_by_one(rule: Rounds, groups: Sequence[list[Any]]) -> list[Any]:
    combine = COMBINE[rule]
    found = []
    for values in groups:
        there = [tuple(value) if type(value) is list else value for value in values if value is not None]
        found.append(combine(there) if there else None)
    return found


def _every(cells: Any, num_rounds: int) -> Any:
    """Return the different texts of each job, joined."""
    codes = cells.dictionary_encode().indices.fill_null(-1).to_numpy().reshape(-1, num_rounds)
    differ = np.flatnonzero((codes != codes[:, :1]).any(axis=1))
    texts = cells.take(pa.array(np.arange(0, len(cells), num_rounds)))
    if not len(differ):
        return texts
    found = texts.to_pylist()
    groups = [cells[job * num_rounds : (job + 1) * num_rounds].to_pylist() for job in differ]
    for job, text in zip(differ, _one_by_one(Rounds.EVERY, groups), strict=True):
        found[job] = text
    return pa.array(found, cells.type)


def _joined(lists: Any, num_rounds: int) -> Any:
    """Return one list for each job: the lists of its rounds, one after another."""
    ends = np.cumsum(pc.list_value_length(lists).fill_null(0).to_numpy())
    offsets = np.concatenate([[0], ends[num_rounds - 1 :: num_rounds]]).astype(np.int32)
    is_there = lists.is_valid().to_numpy(zero_copy_only=False).reshape(-1, num_rounds).any(axis=1)
    return pa.ListArray.from_arrays(pa.array(offsets), lists.flatten(), type=lists.type, mask=pa.array(~is_there))


def _of_errors(texts: list[str | None], num_rounds: int) -> Any:
    """Return the largest error of each tensor for each job."""
    errors = [text and {name: float(error) for name, error in json.loads(text).items()} for text in texts]
    found = _one_by_one(Rounds.WORST, _groups(errors, num_rounds))
    return pa.array(map(cell_of_errors, found), pa.string())
