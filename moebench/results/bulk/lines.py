"""Read the lines of a journal into an Arrow table."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from pydantic_core import from_json

from moebench.results.bulk.schema import ARROW_SCHEMA

#: So many bytes of lines become columns at once. More would need more memory and would not be quicker.
_BYTES = 1 << 20
#: The types that values of JSON have in Python, for each type of a column.
_TYPES = {pa.string(): str, pa.int64(): int, pa.float64(): float, pa.bool_(): bool}
_COLUMNS = tuple(zip(ARROW_SCHEMA.names, ARROW_SCHEMA.types, strict=True))
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
    return pa.concat_tables(parts) if parts else ARROW_SCHEMA.empty_table()


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    if set(map(type, rows)) != {dict} or set(map(len, rows)) != {len(ARROW_SCHEMA)}:
        raise _Unusual
    columns = [_column(name, kind, [row[name] for row in rows]) for name, kind in _COLUMNS]
    return pa.table(columns, schema=ARROW_SCHEMA)


def _column(name: str, kind: Any, values: list[Any]) -> Any:
    types = set(map(type, values))
    if types == {NoneType}:
        return pa.nulls(len(values), kind)
    if name == "parity_errors":
        _demand(types <= {dict, NoneType})
        return pa.array([errors and json.dumps(errors, allow_nan=False) for errors in values], kind)
    if pa.types.is_list(kind):
        _demand(types <= {list, NoneType})
        _demand(set(map(type, chain.from_iterable(filter(None, values)))) <= {_TYPES[kind.value_type]})
    elif pa.types.is_floating(kind):
        _demand(types <= {float, str, NoneType})
        if str in types:
            values = [_INFINITE[value] if type(value) is str else value for value in values]
    else:
        _demand(types <= {_TYPES[kind], NoneType})
    return pa.array(values, kind)


def _demand(fact: bool) -> None:
    if not fact:
        raise _Unusual
