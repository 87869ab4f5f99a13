"""What is checked by columns is never less strict than `Record`: whatever Record refuses or changes is doubted."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from moebench.results.bulk import tables
from moebench.results.bulk.schema import ALIASES, ARROW_SCHEMA
from moebench.results.bulk.valid import are_records
from moebench.results.record import READABLE, Record
from tests.moebench.results.test_frame import ALL, FOLDERS, PUBLISHED, ok, rows

TABLE = tables._to_arrow([ok(**ALL), *rows()[2:]])
_CASES = ("cold", "ok", "oom", "plain", "train", "float16", "relu2", "uniform", "zipf:2", "even", "uneven", "experts")
#: Cells to put into each column, by its type.
CELLS: dict[Any, list[Any]] = {
    pa.string(): [None, "", "x", "..", "../x", "a | b", "1", "{", '{"a": 0.5}', *_CASES],
    pa.int64(): [None, 0, 1, -1, 2, 3, 2**31, 2**62, -(2**63)],
    pa.float64(): [None, 0.0, -0.5, 0.5, 1.5, 3.0, 1e13, 1e31, float("inf"), -float("inf"), float("nan")],
    pa.bool_(): [None, False, True],
    pa.list_(pa.string()): [None, [], ["x"], [None]],
    pa.list_(pa.int64()): [None, [], [0], [0, 0, 1], [0, 0, 7], [0, 1], [-1, 0, 0], [None, 0, 0]],
    pa.list_(pa.float64()): [None, [], [1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [float("nan"), 1.0], [None, 1.0]],
    pa.list_(pa.bool_()): [None, [], [True], [True, False, False], [None, True, True]],
}
ERRORS = ["[]", "1", '{"a": "x"}', '{"a": null}', '{"a": [1]}', '{"a": NaN}', '{"a": "nan"}', '{"a": true}', '{"a": 1}']


def as_record(cells: dict[str, Any]) -> dict[str, Any] | None:
    """Return the cells of a row as Record takes them; None if Record refuses the row."""
    errors = cells["parity_errors"]
    try:
        row = Record.model_validate(cells | {"parity_errors": errors and json.loads(errors)})
    except (ValidationError, ValueError):
        return None
    if row.schema_version not in READABLE:
        return None
    taken: dict[str, Any] = tables._to_arrow([row]).to_pylist()[0]
    return taken


def test_rows_of_every_status_are_records() -> None:
    assert are_records(TABLE)
    assert are_records(ARROW_SCHEMA.empty_table())


@pytest.mark.certify(share=0.4)
@pytest.mark.parametrize("name", ALIASES.values())
def test_what_record_refuses_or_changes_in_a_column_is_doubted(name: str) -> None:
    kind = ARROW_SCHEMA.field(name).type
    missed, num_taken = [], 0
    for number, cells in enumerate(TABLE.to_pylist()):
        for cell in [*CELLS[kind], *(ERRORS if name == "parity_errors" else ())]:
            changed = cells | {name: cell}
            column = pa.array([*TABLE[name].to_pylist()[:number], cell, *TABLE[name].to_pylist()[number + 1 :]], kind)
            table = TABLE.set_column(TABLE.column_names.index(name), ARROW_SCHEMA.field(name), column)
            if not are_records(table):
                continue
            num_taken += 1
            taken = as_record(changed)
            if taken is None or (repr(taken) != repr(changed) and name != "parity_errors"):
                missed.append((number, cell))
    assert missed == []
    assert num_taken, "no cell was taken, so that the test shows nothing"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(PUBLISHED)))
def test_no_published_row_is_doubted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubts cost time: each row would go through Record."""
    monkeypatch.setattr(tables, "_check_rows", lambda rows, path, give: pytest.fail("doubted") if rows else None)
    assert len(tables.load_table(folder)) == pq.read_metadata(folder / "results.parquet").num_rows


def test_a_row_may_not_have_the_case_of_two_contradicting_columns() -> None:
    few = TABLE.set_column(TABLE.column_names.index("n_activated_experts"), "n_activated_experts", [[9] * len(TABLE)])
    assert not are_records(few.cast(ARROW_SCHEMA))
