"""Make a pandas DataFrame of a journal, write the frame as Parquet and CSV, and read it again.

The frame has one row per job and one column per field of `Record`. Each column has a fixed dtype, so that the frames of
an empty run, a run of failures and a full run can be concatenated. Null is NaN in a float column and `<NA>` elsewhere.
Infinity is a value. A cell of the column `parity_errors` is a JSON object in a string, because the object's keys differ
from row to row. The function `parity_errors` reads such a cell. docs/results.md explains every column.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from pandas.api.types import is_numeric_dtype

from moebench import escapes
from moebench.results.bulk.errors import errors_of_cell
from moebench.results.bulk.schema import ARROW_SCHEMA, ARROW_TYPES, COLUMNS, SAMPLE_COLUMNS
from moebench.results.bulk.tables import load_table, records_of, table_of
from moebench.results.columns import jsonable
from moebench.results.files import PARQUET_NAME, write_atomically
from moebench.results.record import Record

__all__ = ["ARROW_SCHEMA", "COLUMNS", "SAMPLE_COLUMNS"]

CSV_NAME = "results.csv"

_PANDAS_TYPES: Mapping[Any, Any] = {
    pa.string(): pd.StringDtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
    **{kind: pd.ArrowDtype(kind) for kind in ARROW_TYPES.values() if pa.types.is_list(kind)},
}


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return a frame with one row per job, in the order in which the jobs first appear.

    Each row is made of the records of all rounds of its job. If a job has several records of one round, the last record
    counts.
    """
    return _to_pandas(table_of(list(records)))


def to_records(frame: pd.DataFrame) -> list[Record]:
    """Return the record of each row of a frame."""
    return records_of(pa.Table.from_pandas(frame, schema=ARROW_SCHEMA, preserve_index=False))


def load(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Return the results in a Parquet file or in a folder. If a folder has a journal, its results.parquet is not read.

    Raises ResultsError if `path` does not exist, holds no results, or holds results that this moebench cannot read.
    """
    return _to_pandas(load_table(path))


def load_all(paths: Iterable[Path]) -> pd.DataFrame:
    """Return the rows of several results in one frame. Raises ResultsError as `load` does."""
    return pd.concat([load(path) for path in paths], ignore_index=True)


def to_json(frame: pd.DataFrame) -> str:
    """Return a JSON array with one object per row. A cell that was not measured is null, and infinity is "inf"."""
    rows = pa.Table.from_pandas(frame, preserve_index=False).to_pylist()
    cells = ({name: jsonable(cell) if isinstance(cell, float) else cell for name, cell in row.items()} for row in rows)
    return json.dumps(list(cells), allow_nan=False)


def parity_errors(cell: str | None) -> dict[str, float]:
    """Return the error of each tensor divided by the tensor's budget, from a cell of the column `parity_errors`.

    The dictionary is empty if the cell is null.
    """
    return {} if cell is None or pd.isna(cell) else errors_of_cell(cell)


def write(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write results.parquet, and results.csv without samples, into the existing `folder`. Return the two paths.

    A crash leaves each file as it was, or complete and new.
    """
    table = pa.Table.from_pandas(frame, schema=ARROW_SCHEMA, preserve_index=False).replace_schema_metadata(None)
    parquet = pa.BufferOutputStream()
    # readers need the whole file, and hardly a sample repeats: statistics and dictionaries would be a third of it
    options = {"compression_level": 19, "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, parquet, compression="zstd", **options)
    write_atomically(folder / PARQUET_NAME, parquet.getvalue().to_pybytes())
    return [folder / PARQUET_NAME, write_csv(frame, folder)]


def write_csv(frame: pd.DataFrame, folder: Path) -> Path:
    """Write results.csv, which has no samples, into the existing `folder`. Return its path."""
    flat = frame[[name for name in COLUMNS if name not in SAMPLE_COLUMNS]]
    lists = [name for name in map(str, flat) if pa.types.is_list(ARROW_SCHEMA.field(name).type)]
    joined = {
        name: [None if cell is None else ";".join(map(str, cell)) for cell in _cells(frame[name])] for name in lists
    }
    flat = flat.assign(**{name: pd.Series(cells, flat.index, dtype=object) for name, cells in joined.items()})
    write_atomically(folder / CSV_NAME, to_csv(flat).encode())
    return folder / CSV_NAME


def _cells(lists: "pd.Series[Any]") -> list[Any]:
    """Return the cells of a column of lists, with None for null."""
    return [None if null else cell for cell, null in zip(lists, lists.isna(), strict=True)]


def to_csv(frame: pd.DataFrame) -> str:
    """Return a frame as CSV. Its texts and the names of its columns are written as moebench.escapes.csv does it."""
    texts = {str(name): cells.map(_csv_cell) for name, cells in frame.items() if not is_numeric_dtype(cells.dtype)}
    return frame.assign(**texts).rename(columns=_csv_cell).to_csv(index=False, lineterminator="\n")


def _csv_cell(cell: Any) -> Any:
    return escapes.csv(cell) if isinstance(cell, str) else cell


def _to_pandas(table: Any) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(types_mapper=_PANDAS_TYPES.get, ignore_metadata=True)
    return frame
