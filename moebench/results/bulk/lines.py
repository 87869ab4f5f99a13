"""Read the lines of a journal into an Arrow table."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from pydantic_core import from_json

from moebench.results.bulk.errors import cell_of_errors
from moebench.results.bulk.schema import ARROW_SCHEMA

#: So many bytes of lines become columns at once. More would need more memory and would not be quicker.
_BYTES = 1 << 20
#: The types that values of JSON have in Python, for each type of a column.
_TYPES = {pa.string(): str, pa.int64(): int, pa.float64(): float, pa.bool_(): bool}
_NAMES: list[str] = ARROW_SCHEMA.names
_COLUMNS = tuple(zip(_NAMES, ARROW_SCHEMA.types, strict=True))
#: How JSON writes what it has no numbers for.
_INFINITE = {"inf": float("inf"), "-inf": -float("inf")}


class _Unusual(Exception):
    """A line is not as `Journal.append` writes it."""


def table_of_lines(path: Path) -> Any | None:
    """Return a table with a row for each line of a journal, or None unless each line is as `Journal.append` writes it.

    Each row then has all columns, with values of their types. They may still be invalid.
    """
    parts = []
    with path.open("rb") as file:
        while lines := file.readlines(_BYTES):
            try:
                parts.append(_table(list(map(from_json, lines))))
            except (_Unusual, ValueError, TypeError, KeyError, OverflowError, pa.ArrowException):
                return None
    return pa.concat_tables(parts).combine_chunks() if parts else ARROW_SCHEMA.empty_table()


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    _demand(all(type(row) is dict and list(row) == _NAMES for row in rows))
    cells = zip(*map(dict.values, rows), strict=True)
    columns = [_column(name, kind, list(some)) for (name, kind), some in zip(_COLUMNS, cells, strict=True)]
    return pa.table(columns, schema=ARROW_SCHEMA)


def _column(name: str, kind: Any, values: list[Any]) -> Any:
    types = set(map(type, values))
    if types == {NoneType}:
        return pa.nulls(len(values), kind)
    if name == "parity_errors":
        _demand(types <= {dict, NoneType})
        return pa.array(map(_cell_of_errors, values), kind)
    if pa.types.is_list(kind):
        _demand(types <= {list, NoneType})
        return _lists(kind, values)
    if pa.types.is_floating(kind):
        _demand(types <= {float, str, NoneType})
        if str in types:
            values = [_INFINITE[value] if type(value) is str else value for value in values]
    else:
        _demand(types <= {_TYPES[kind], NoneType})
    return pa.array(values, kind)


def _lists(kind: Any, lists: list[list[Any] | None]) -> Any:
    there = list(filter(None, lists))
    if all(some == [some[0]] * len(some) for some in there):  # such as the round of each sample
        firsts, lengths = [some[0] for some in there], [len(some) for some in there]
        _demand(set(map(type, firsts)) <= {_TYPES[kind.value_type]})
        values = pa.array(firsts, kind.value_type).take(pa.array(np.repeat(np.arange(len(there)), lengths)))
        offsets = np.cumsum([0, *(len(some or ()) for some in lists)], dtype=np.int32)
        mask = pa.array([some is None for some in lists])
        return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=mask)
    _demand(set(map(type, chain.from_iterable(there))) <= {_TYPES[kind.value_type]})
    return pa.array(lists, kind)


def _cell_of_errors(errors: dict[str, Any] | None) -> str | None:
    """Return errors as a cell. Record takes each number as it is."""
    if errors is None:
        return None
    types = set(map(type, errors.values()))
    if types == {float}:
        return cell_of_errors(errors)
    _demand(types <= {float, str})
    return cell_of_errors({name: _INFINITE[some] if type(some) is str else some for name, some in errors.items()})


def _demand(fact: bool) -> None:
    if not fact:
        raise _Unusual
