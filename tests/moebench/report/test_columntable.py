"""docs/results.md has every column, with the text that the code declares for it."""

import re
from pathlib import Path

from moebench.report.columntable import table, with_tables
from moebench.results.frame import COLUMNS

DOCUMENT = (Path(__file__).parents[3] / "docs" / "results.md").read_text()


def test_the_document_has_the_tables_that_the_columns_make() -> None:
    assert with_tables(DOCUMENT) == DOCUMENT, "`make results` writes the tables again"


def test_the_tables_have_every_column_once_in_order() -> None:
    parts = re.findall(r"<!-- columns \w+ to \w+ -->\n(.*?)<!-- end of columns -->", DOCUMENT, re.DOTALL)
    assert tuple(re.findall(r"^\| `(\w+)` \|", "".join(parts), re.MULTILINE)) == COLUMNS


def test_what_stood_in_a_table_is_replaced_and_nothing_around_it() -> None:
    text = "before\n<!-- columns num_samples to samples_ms -->\nold\n<!-- end of columns -->\nafter\n"
    assert with_tables(text) == text.replace("old\n", table("num_samples", "samples_ms"))


def test_a_line_has_type_unit_rounds_and_null() -> None:
    assert table("samples_ms", "samples_ms").splitlines()[2:] == [
        "| `samples_ms` | list of floats, ms | one after another | unless ok | the raw samples, in order |"
    ]
    assert table("env_id", "env_id").splitlines()[2].startswith("| `env_id` | string | all that occur | never |")
    assert table("schema", "schema").splitlines()[2].startswith("| `schema` | int | same in all | never |")
