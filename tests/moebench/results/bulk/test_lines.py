"""Lines of a journal as a table, and which lines are left to `Record`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pandas.testing import assert_frame_equal

from moebench.errors import ResultsError
from moebench.results.bulk import tables
from moebench.results.bulk.lines import table_of_lines
from moebench.results.bulk.valid import are_records
from moebench.results.frame import load, to_frame
from moebench.results.record import Record, Status
from tests.moebench.results.test_frame import ALL, bad, ok, rows


def journal(folder: Path, *lines: str) -> Path:
    path = folder / "journal.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_lines_that_append_writes_make_the_table_that_their_records_make(tmp_path: Path) -> None:
    few = ok("few", time_ms_low=-math.inf, time_ms_high=math.inf, samples_ms=(1.5,), sample_rounds=(0,))
    some = [*rows(), few, bad(Status.mismatch, "x", parity_worst=math.inf, parity_errors={"ö%": 2.0, 'a"b': math.inf})]
    path = journal(tmp_path, *(row.to_json() for row in some))
    table = table_of_lines(path)
    assert table is not None
    assert are_records(table)
    assert table.equals(tables._to_arrow(some))
    assert_frame_equal(load(tmp_path), to_frame(some), check_exact=True)


def test_an_empty_journal_is_an_empty_table(tmp_path: Path) -> None:
    table = table_of_lines(journal(tmp_path))
    assert table is not None
    assert len(table) == 0


def line(**cells: Any) -> str:
    return json.dumps(json.loads(ok(**ALL).to_json()) | cells)


#: Lines that `Record` takes, but does not take as they are or as all others are.
CHANGED = {
    "a text for a number": line(time_ms="1.5"),
    "an integer for a number": line(roofline_ms=1),
    "a number for an integer": line(num_samples=3.0),
    "an integer for a bool": line(converged=1),
    "nan for an error": line(parity_errors={"output": "nan"}),
    "an integer for an error": line(parity_errors={"output": 0}),
    "no column of a later moebench": json.dumps(
        {name: cell for name, cell in json.loads(line()).items() if name != "graph_time_ms"}
    ),
    "mixed samples": line(samples_ms=[1, 1.25, 1.5]),
    "the parts of a context in another order": line(mode="train", context="offload+checkpoint"),
    "a blank line": line() + "\n",
    "a torn line": line() + '\n{"case_id": ',
    "two keys of one name": line().replace('"round": 0', '"round": 1, "round": 0'),
}


@pytest.mark.parametrize("what", CHANGED)
def test_an_unusual_line_has_the_row_that_record_makes_of_it(what: str, tmp_path: Path) -> None:
    path = journal(tmp_path, ok("te").to_json(), CHANGED[what])
    changed = Record.model_validate_json(CHANGED[what].strip().splitlines()[0])
    assert_frame_equal(load(tmp_path), to_frame([ok("te"), changed]), check_exact=True)
    table = table_of_lines(path)
    assert what == "two keys of one name" or table is None or not are_records(table)


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"time_ms": None}, "needs a time"),
        ({"samples_ms": [1.5, 1.25, None]}, "samples_ms.2"),
        ({"sample_rounds": [0, 0]}, "one entry for each sample"),
        ({"status": "fine"}, "status"),
        ({"colour": "red"}, "colour"),
        ({"case_id": "../x"}, "case_id"),
        ({"schema": 3}, "schema 3"),
    ],
)
def test_a_wrong_line_is_told_with_its_number(cells: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = journal(tmp_path, ok("te").to_json(), line(**cells))
    with pytest.raises(ResultsError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert says in str(caught.value)
