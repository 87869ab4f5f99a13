"""Make a pandas DataFrame of a journal, write the frame as Parquet and CSV, and read it again.

The frame has one row per job and one column per field of `Record`. Each column has a fixed dtype, so that the frames of
an empty run, a run of failures and a full run can be concatenated. Null is NaN in a float column and `<NA>` elsewhere.
Infinity is a value. A cell of the column `parity_errors` is a JSON object in a string, because the object's keys differ
from row to row. The function `parity_errors` reads such a cell. docs/results.md explains every column.
"""

import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from pandas.api.types import is_numeric_dtype
from pydantic import ValidationError

from moebench import escapes
from moebench.errors import ResultsError, first_mistake
from moebench.results.bulk.errors import cell_of_errors
from moebench.results.bulk.lines import table_of_lines
from moebench.results.bulk.rounds import can_combine, combined, rows_of_jobs
from moebench.results.bulk.schema import ALIASES, ARROW_SCHEMA, ARROW_TYPES, COLUMNS, SAMPLE_COLUMNS
from moebench.results.bulk.valid import are_records
from moebench.results.columns import jsonable
from moebench.results.files import PARQUET_NAME, write_atomically
from moebench.results.journal import JOURNAL_NAME, read_journal, record_of
from moebench.results.record import Record
from moebench.results.rounds import merged_rounds
from moebench.workload.case import KEY, JobKey

__all__ = ["ARROW_SCHEMA", "COLUMNS", "SAMPLE_COLUMNS"]

CSV_NAME = "results.csv"

_PANDAS_TYPES: Mapping[Any, Any] = {
    pa.string(): pd.StringDtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
    **{kind: pd.ArrowDtype(kind) for kind in ARROW_TYPES.values() if pa.types.is_list(kind)},
}


#: Columns that a Parquet file may lack, with the value that `load` then puts into each of their cells.
_OPTIONAL = {
    name: field.default for name, field in Record.model_fields.items() if not (field.is_required() or field.alias)
}


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return a frame with one row per job, in the order in which the jobs first appear.

    Each row is made of the records of all rounds of its job. If a job has several records of one round, the last record
    counts.
    """
    table = _to_arrow(list(records))
    return _to_pandas(_merged(table))


def _to_arrow(records: Sequence[Record]) -> Any:
    """Return a table with one row per record."""
    columns = {alias: [getattr(row, name) for row in records] for name, alias in ALIASES.items()}
    columns["parity_errors"] = [cell_of_errors(errors) for errors in columns["parity_errors"]]
    return pa.table(columns, schema=ARROW_SCHEMA)


def _merged(table: Any) -> Any:
    """Return a table with one row per job, of a table with one row per job and round."""
    jobs = rows_of_jobs(table)
    if len(jobs) == len(table):
        return table
    can, environments, numbers = can_combine(table), *(table[name].to_pylist() for name in ("env_id", "round"))
    has_busy = table["busy_ms"].is_valid().to_numpy()
    groups: dict[int, list[int]] = {}  # the jobs that are merged together, by their number of rounds; 0: the others
    for job, rows in enumerate(jobs):
        is_usual = can[rows].all() and len({environments[row] for row in rows}) == 1 and len(set(has_busy[rows])) == 1
        groups.setdefault(len(rows) if is_usual or len(rows) == 1 else 0, []).append(job)
    parts = []
    for num_rounds, some in groups.items():
        ordered = [sorted(jobs[job], key=lambda row: numbers[row] or 0) if num_rounds else jobs[job] for job in some]
        if num_rounds > 1:
            parts.append(_of_rounds(table, np.array(ordered)))
        else:
            rows = table.take(pa.array(chain.from_iterable(ordered), pa.int64()))
            parts.append(rows if num_rounds else _one_by_one(rows, list(map(len, ordered))))
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(list(chain.from_iterable(groups.values())))
    return pa.concat_tables(parts).combine_chunks().take(pa.array(order))


def _of_rounds(table: Any, rows: np.ndarray) -> Any:
    """Merge the rounds of jobs; `rows` is as moebench.results.bulk.rounds.combined takes it."""
    try:
        merged = combined(table, rows)
    except (pa.ArrowException, OverflowError):  # a sum that no column holds
        merged = None
    if merged is not None and are_records(merged, has_checked_errors=True):
        return merged
    return _one_by_one(table.take(pa.array(rows.ravel())), [rows.shape[1]] * len(rows))


def _one_by_one(table: Any, counts: Sequence[int]) -> Any:
    """Merge the rounds of each job by itself; the jobs have so many rows, one job after the other.

    Raises ValidationError if the rounds of a job do not make one row.
    """
    records = iter(_to_records(table))
    return _to_arrow([merged_rounds(list(islice(records, count))) for count in counts])


def to_records(frame: pd.DataFrame) -> list[Record]:
    """Return the record of each row of a frame."""
    return _to_records(pa.Table.from_pandas(frame, schema=ARROW_SCHEMA, preserve_index=False))


def _to_records(table: Any) -> list[Record]:
    rows = table.to_pylist()
    return [Record.model_validate(row | {"parity_errors": parity_errors(row["parity_errors"]) or None}) for row in rows]


def to_json(frame: pd.DataFrame) -> str:
    """Return a JSON array with one object per row. A cell that was not measured is null, and infinity is "inf"."""
    rows = pa.Table.from_pandas(frame, preserve_index=False).to_pylist()
    cells = ({name: jsonable(cell) if isinstance(cell, float) else cell for name, cell in row.items()} for row in rows)
    return json.dumps(list(cells), allow_nan=False)


def parity_errors(cell: str | None) -> dict[str, float]:
    """Return the error of each tensor divided by the tensor's budget, from a cell of the column `parity_errors`.

    The dictionary is empty if the cell is null.
    """
    if cell is None or pd.isna(cell):
        return {}
    return {tensor: float(error) for tensor, error in json.loads(cell).items()}


def load(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Return the results in a Parquet file or in a folder. If a folder has a journal, its results.parquet is not read.

    Raises ResultsError if `path` does not exist, holds no results, or holds results that this moebench cannot read.
    """
    path = Path(path)
    if path.is_file():
        return _read_parquet(path)
    if not path.is_dir():
        raise ResultsError(f"{path}: no such file or folder; give a results folder or a results.parquet")
    if (path / JOURNAL_NAME).is_file():
        return _of_journal(path / JOURNAL_NAME)
    if (path / PARQUET_NAME).is_file():
        return _read_parquet(path / PARQUET_NAME)
    raise ResultsError(
        f"{path}: holds neither {JOURNAL_NAME} nor {PARQUET_NAME}, but a results folder has one of them; "
        "give the folder that `moebench run` names in its last line"
    )


def _of_journal(path: Path) -> pd.DataFrame:
    table = table_of_lines(path)
    try:
        if table is not None and are_records(table, has_checked_errors=True):
            return _to_pandas(_merged(table))
        return to_frame(read_journal(path))
    except ValidationError as error:
        raise ResultsError(
            f"{path}: the rounds of a job do not make one row: {first_mistake(error)}; "
            "open it with the moebench that wrote it"
        ) from error


def write(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write results.parquet, and results.csv without samples, into the existing `folder`. Return the two paths.

    A crash leaves each file as it was, or complete and new.
    """
    table = pa.Table.from_pandas(frame, schema=ARROW_SCHEMA, preserve_index=False).replace_schema_metadata(None)
    parquet = pa.BufferOutputStream()
    pq.write_table(table, parquet, compression="zstd")
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


def _read_parquet(path: Path) -> pd.DataFrame:
    give = f"give the {PARQUET_NAME} that `moebench run` wrote"
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ResultsError(
            f"{path}: not a Parquet file ({_first_line(error)}); give a results folder or its {PARQUET_NAME}"
        ) from error
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise ResultsError(f"{path}: the column {', '.join(map(repr, twice[:3]))} is there twice; {give}")
    for name, default in _OPTIONAL.items():
        if name not in table.column_names:  # an older moebench, without this column, wrote the file
            cells = pa.array([default] * len(table), ARROW_SCHEMA.field(name).type)
            table = table.append_column(name, cells)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ResultsError(
            f"{path}: no column {', '.join(missing[:3])}{' …' * (len(missing) > 3)}, which results must have; {give}"
        )
    try:
        table = table.select(COLUMNS).cast(ARROW_SCHEMA)
        is_usual = are_records(table) and len(table.group_by(KEY).aggregate([])) == len(table)
        rows = [] if is_usual else table.to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise ResultsError(
            f"{path}: a column has another type than this moebench reads ({_first_line(error)}); {give}"
        ) from error
    _check_rows(rows, path, give)
    return _to_pandas(table)


def _check_rows(rows: Sequence[dict[str, Any]], path: Path, give: str) -> None:
    """Raise ResultsError for the first row that is not a record, or of the same job as a row before."""
    jobs: dict[JobKey, int] = {}
    for number, cells in enumerate(rows, start=1):
        key = _checked(cells, f"{path}: row {number}").key
        if key in jobs:
            raise ResultsError(f"{path}: the rows {jobs[key]} and {number} are of the same job; {give}")
        jobs[key] = number


def _checked(cells: dict[str, Any], place: str) -> Record:
    """Return the record of a row of Parquet. Raises ResultsError if the row is not a record."""
    errors = cells["parity_errors"]
    try:
        cells["parity_errors"] = errors and json.loads(errors)
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{place}: parity_errors = {reprlib.repr(errors)}: must be a JSON object") from error
    return record_of(cells, place)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
