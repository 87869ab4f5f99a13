"""Read results as an Arrow table with one row per job and one column per field of `Record`.

moebench.results.frame makes frames of these tables. A caller that needs a few columns only takes them from the table:
to make a frame of it takes longer than to read it.
"""

import json
import os
import reprlib
from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from pydantic import ValidationError

from moebench.errors import ResultsError, first_mistake
from moebench.results.bulk.errors import cell_of_errors, errors_of_cell
from moebench.results.bulk.lines import table_of_lines
from moebench.results.bulk.rounds import can_combine, combined, rows_of_jobs
from moebench.results.bulk.schema import ALIASES, ARROW_SCHEMA, COLUMNS
from moebench.results.bulk.valid import are_records
from moebench.results.files import PARQUET_NAME
from moebench.results.journal import JOURNAL_NAME, read_journal, record_of
from moebench.results.record import Record
from moebench.results.rounds import merged_rounds
from moebench.workload.case import KEY, JobKey

#: Columns that a Parquet file may lack, with the value that `load` then puts into each of their cells.
_OPTIONAL = {
    name: field.default for name, field in Record.model_fields.items() if not (field.is_required() or field.alias)
}


def load_table(path: str | os.PathLike[str]) -> Any:
    """Return the results in a Parquet file or in a folder, as `moebench.results.frame.load` does, as an Arrow table."""
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


def _of_journal(path: Path) -> Any:
    table = table_of_lines(path)
    try:
        if table is not None and are_records(table, has_checked_errors=True):
            return _merged(table)
        return table_of(read_journal(path))
    except ValidationError as error:
        raise ResultsError(
            f"{path}: the rounds of a job do not make one row: {first_mistake(error)}; "
            "open it with the moebench that wrote it"
        ) from error


def table_of(records: Sequence[Record]) -> Any:
    """Return a table with one row per job, as `moebench.results.frame.to_frame` makes it of records."""
    return _merged(_to_arrow(records))


def records_of(table: Any) -> list[Record]:
    """Return the record of each row of a table."""
    return [
        Record.model_validate(row | {"parity_errors": errors_of_cell(row["parity_errors"]) or None})
        for row in table.to_pylist()
    ]


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
    records = iter(records_of(table))
    return _to_arrow([merged_rounds(list(islice(records, count))) for count in counts])


def _read_parquet(path: Path) -> Any:
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
            cell = pa.scalar(default, ARROW_SCHEMA.field(name).type)
            table = table.append_column(name, pa.repeat(cell, len(table)))
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
    return table


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
