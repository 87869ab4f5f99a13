"""Find out whether all rows of a table are valid records, by looking at each column as a whole.

The functions never take an invalid row for a valid one. They may doubt a valid row, so whoever gets False asks `Record`
about each row.
"""

import json
from collections.abc import Mapping
from itertools import chain, combinations
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from pydantic import TypeAdapter, ValidationError

from moebench.results.bulk.schema import ALIASES, SAMPLE_COLUMNS
from moebench.results.record import ONLY_IF_OK, READABLE, Record, Status
from moebench.workload.case import CaseFields

_CASE = tuple(CaseFields.model_fields)
#: Texts that stand for numbers in JSON. Record would change "nan".
_INFINITE = frozenset({"inf", "-inf"})


def are_records(table: Any, *, has_checked_errors: bool = False) -> bool:
    """Return whether each row of a table with the schema ARROW_SCHEMA is certainly a record that Record takes as it is.

    Numbers are within the limits of their column if the least and the largest are. Texts are valid if each different
    text is. Rules about several columns are computed for all rows at once. With `has_checked_errors`, the column
    `parity_errors` is known to be valid.
    """
    checked = ("parity_errors",) if has_checked_errors else ()
    return (
        all(_holds(name, table[alias]) for name, alias in ALIASES.items() if name not in checked)
        and set(table["schema"].unique().to_pylist()) <= set(READABLE)
        and _are_cases(table.select(_CASE))
        and _statuses_agree(table)
        and _times_agree(table)
        and _samples_agree({name: table[name].combine_chunks() for name in SAMPLE_COLUMNS})
    )


class _Adapters(dict[str, TypeAdapter[Any]]):
    """For each field of Record, what validates a value of it. Each is made when it is first needed."""

    def __missing__(self, name: str) -> TypeAdapter[Any]:
        return self.setdefault(name, TypeAdapter(Record.model_fields[name].rebuild_annotation()))


_FIELDS = _Adapters()


def _takes(name: str, value: object) -> bool:
    """Return whether a field of Record takes a value, and takes it as it is."""
    try:
        return bool(_FIELDS[name].validate_python(value) == value)
    except ValidationError:
        return False


def _holds(name: str, cells: Any) -> bool:
    """Return whether a column holds values that its field takes as they are."""
    if cells.null_count and not _takes(name, None):
        return False
    if cells.null_count == len(cells):
        return True
    if name == "parity_errors":
        return _are_errors(cells.unique().to_pylist())
    is_list = pa.types.is_list(cells.type)
    values = pc.list_flatten(cells) if is_list else cells.drop_null()
    if values.null_count or (pa.types.is_floating(values.type) and pc.any(pc.is_nan(values)).as_py()):
        return False
    if pa.types.is_string(values.type):
        some = values.unique().to_pylist()
    else:
        some = list(pc.min_max(values).as_py().values()) if len(values) else []
    return _takes(name, tuple(some)) if is_list else all(_takes(name, value) for value in some)


def _are_errors(texts: list[str | None]) -> bool:
    """Return whether each text is a JSON object whose values are numbers as moebench writes them."""
    try:
        found = [json.loads(text) for text in texts if text is not None]
    except (ValueError, RecursionError):
        return False
    if not set(map(type, found)) <= {dict}:
        return False
    values = list(chain.from_iterable(map(dict.values, found)))
    kinds = set(map(type, values))
    return kinds <= {float, str} and (str not in kinds or {one for one in values if type(one) is str} <= _INFINITE)


def _are_cases(table: Any) -> bool:
    """Return whether the fields of each case agree with each other."""
    cases = table.group_by(table.column_names, use_threads=False).aggregate([]).to_pylist()
    try:
        return all(dict(CaseFields.model_validate(case)) == case for case in cases)
    except ValidationError:
        return False


def _is_there(table: Any, name: str) -> np.ndarray:
    there: np.ndarray = table[name].is_valid().to_numpy()
    return there


def _statuses_agree(table: Any) -> bool:
    """Return whether each row has what its status needs, and nothing that its status excludes."""
    is_ok = pc.equal(table["status"], Status.ok.value).to_numpy()
    is_mismatch = pc.equal(table["status"], Status.mismatch.value).to_numpy()
    worst = _numbers(table, "parity_worst")
    has_carried = np.any([_is_there(table, ALIASES[name]) for name in ONLY_IF_OK], axis=0)
    has_reason = pc.fill_null(pc.not_equal(table["detail"], ""), False).to_numpy()
    fits = np.where(
        is_ok,
        (_is_there(table, "time_ms") | _is_there(table, "check")) & (worst <= 1),
        ~has_carried & has_reason & (~is_mismatch | _is_there(table, "parity_worst")),
    )
    return bool(fits.all())


def _numbers(table: Any, name: str) -> np.ndarray:
    """Return a column of floats; NaN stands for null."""
    numbers: np.ndarray = table[name].to_numpy()
    return numbers.astype(float)


def _times_agree(table: Any) -> bool:
    """Return whether each time lies within its interval."""
    for name in ("time_ms", "busy_ms"):
        time_ms, low, high = (_numbers(table, name + end) for end in ("", "_low", "_high"))
        if np.any((low > time_ms) | (time_ms > high)):  # false where one of them is null
            return False
    return True


def _samples_agree(lists: Mapping[str, Any]) -> bool:
    """Return whether the lists of each row have equal lengths and rounds, as Record demands it."""
    for names in (("samples_ms", "sample_rounds", "sample_marked"), ("busy_samples_ms", "busy_sample_rounds")):
        lengths = [pc.list_value_length(lists[name]) for name in names]
        if not all(pc.all(pc.equal(one, two)).as_py() in (True, None) for one, two in combinations(lengths, 2)):
            return False
    has_busy = lists["busy_sample_rounds"].is_valid()
    busy, rounds = (lists[name].filter(has_busy).to_pylist() for name in ("busy_sample_rounds", "sample_rounds"))
    return all(set(some) <= set(of or (0,)) for some, of in zip(busy, rounds, strict=True))
