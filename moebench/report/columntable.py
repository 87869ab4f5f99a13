"""Write the tables of docs/results.md that explain the columns of results, from the declarations of the columns.

    python -m moebench.report.columntable docs/results.md

The command replaces the text between `<!-- columns FIRST to LAST -->` and `<!-- end of columns -->` with a table. The
table has one row for each column of results from FIRST to LAST, in the order in which results have them.
"""

import re
import sys
from pathlib import Path
from types import NoneType
from typing import get_args

import pyarrow as pa  # type: ignore[import-untyped]

from moebench.results.frame import ARROW_SCHEMA, COLUMNS
from moebench.results.record import COLUMN_OF, Record

_TABLE = re.compile(r"(<!-- columns (\w+) to (\w+) -->\n).*?(<!-- end of columns -->)", re.DOTALL)
_HEAD = "| column | type, unit | over several rounds | null | meaning |\n| --- | --- | --- | --- | --- |\n"
_TYPES = {pa.string(): "string", pa.int64(): "int", pa.float64(): "float", pa.bool_(): "bool"}


def with_tables(text: str) -> str:
    """Return the document `text` with its tables of columns written again from the declarations."""
    return _TABLE.sub(lambda found: found[1] + table(found[2], found[3]) + found[4], text)


def table(first: str, last: str) -> str:
    """Return a Markdown table with one row for each column of results from `first` to `last`."""
    lines = dict(zip(COLUMNS, map(_line, Record.model_fields), strict=True))
    return _HEAD + "".join(lines[name] for name in COLUMNS[COLUMNS.index(first) : COLUMNS.index(last) + 1])


def _line(field: str) -> str:
    column, name = COLUMN_OF[field], Record.model_fields[field].alias or field
    cells = [f"`{name}`", ", ".join(filter(None, (_type(name), column.unit))), column.rounds]
    null = column.null if NoneType in get_args(Record.model_fields[field].annotation) else "never"
    return f"| {' | '.join([*cells, null, column.means])} |\n"


def _type(name: str) -> str:
    type_ = ARROW_SCHEMA.field(name).type
    return f"list of {_TYPES[type_.value_type]}s" if pa.types.is_list(type_) else _TYPES[type_]


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(with_tables(document.read_text()))
