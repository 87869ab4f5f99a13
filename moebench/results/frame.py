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
from collections.abc import Hashable, Iterable, Mapping
from itertools import combinations
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from pandas.api.types import is_numeric_dtype
from pydantic import TypeAdapter, ValidationError

from moebench import escapes
from moebench.errors import ResultsError, first_mistake
from moebench.results.columns import Rounds, jsonable
from moebench.results.files import PARQUET_NAME, write_atomically
from moebench.results.journal import JOURNAL_NAME, read_journal, record_of
from moebench.results.record import COLUMN_OF, Record, Status
from moebench.results.rounds import merged_rounds
from moebench.workload.case import JobKey

CSV_NAME = "results.csv"

#: Columns that the CSV leaves out: nobody reads thousands of numbers in one cell.
SAMPLE_COLUMNS = tuple(name for name, column in COLUMN_OF.items() if column.rounds is Rounds.SAMPLES)

_SAMPLES = {name: TypeAdapter[Any](Record.model_fields[name].rebuild_annotation()) for name in SAMPLE_COLUMNS}

_ARROW_TYPES: Mapping[Hashable, Any] = {
    str: pa.string(),
    Status: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    tuple[str, ...]: pa.list_(pa.string()),
    tuple[int, ...]: pa.list_(pa.int64()),
    tuple[float, ...]: pa.list_(pa.float64()),
    tuple[bool, ...]: pa.list_(pa.bool_()),
    dict[str, float]: pa.string(),
}
_PANDAS_TYPES: Mapping[Any, Any] = {
    pa.string(): pd.StringDtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
    **{kind: pd.ArrowDtype(kind) for kind in _ARROW_TYPES.values() if pa.types.is_list(kind)},
}


def _bare(annotation: Any) -> Any:
    """Return the type of the values that an annotation allows, without `Annotated` and without None."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bare(arguments[0])
    if origin is Literal:
        return type(arguments[0])
    if origin in (tuple, dict):
        return origin[tuple(some if some is ... else _bare(some) for some in arguments)]
    if origin in (Union, UnionType):
        (some,) = (kind for kind in arguments if kind is not NoneType)
        return _bare(some)
    return annotation


#: The name of each field of Record in the journal and in frames.
_ALIASES = {name: field.alias or name for name, field in Record.model_fields.items()}
#: The Arrow schema of all results: Record's fields in their order, with the names that the journal uses.
ARROW_SCHEMA = pa.schema(
    [(_ALIASES[name], _ARROW_TYPES[_bare(field.annotation)]) for name, field in Record.model_fields.items()]
)
COLUMNS: tuple[str, ...] = tuple(ARROW_SCHEMA.names)
#: Columns that a Parquet file may lack, with the value that `load` then puts into each of their cells.
_OPTIONAL = {
    name: field.default for name, field in Record.model_fields.items() if not (field.is_required() or field.alias)
}


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return a frame with one row per job, in the order in which the jobs first appear.

    Each row is made of the records of all rounds of its job. If a job has several records of one round, the last record
    counts.
    """
    latest = {(*row.key, row.round): row for row in records}
    jobs: dict[Hashable, list[Record]] = {}
    for row in latest.values():
        jobs.setdefault(row.key, []).append(row)
    merged = [merged_rounds(rounds) for rounds in jobs.values()]
    columns = {alias: [getattr(row, name) for row in merged] for name, alias in _ALIASES.items()}
    columns["parity_errors"] = [
        errors and json.dumps({name: jsonable(error) for name, error in errors.items()})
        for errors in columns["parity_errors"]
    ]
    return _to_pandas(pa.table(columns, schema=ARROW_SCHEMA))


def to_records(frame: pd.DataFrame) -> list[Record]:
    """Return the record of each row of a frame."""
    rows = pa.Table.from_pandas(frame, schema=ARROW_SCHEMA, preserve_index=False).to_pylist()
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
    rows = read_journal(path)
    try:
        return to_frame(rows)
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
        rows = _without_samples(table).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise ResultsError(
            f"{path}: a column has another type than this moebench reads ({_first_line(error)}); {give}"
        ) from error
    jobs: dict[JobKey, int] = {}
    for number, cells in enumerate(rows, start=1):
        key = _checked(cells, f"{path}: row {number}").key
        if key in jobs:
            raise ResultsError(f"{path}: the rows {jobs[key]} and {number} are of the same job; {give}")
        jobs[key] = number
    return _to_pandas(table)


def _without_samples(table: Any) -> Any:
    """Return the table with an empty list for each list of samples, if all lists are valid; else the table as it is.

    A valid list has numbers within the limits of its column, is as long as the other lists of its row, and has no round
    that they lack. The columns are checked as a whole. Record would take twenty times as long for the lists of rows.
    """
    lists = {name: table[name].combine_chunks() for name in SAMPLE_COLUMNS}
    if not (all(_has_valid_numbers(name, some) for name, some in lists.items()) and _agree(lists)):
        return table
    for name, some in lists.items():
        empty = pa.ListArray.from_arrays([0] * (len(some) + 1), some.values[:0], mask=some.is_null())
        table = table.set_column(table.column_names.index(name), ARROW_SCHEMA.field(name), empty)
    return table


def _has_valid_numbers(name: str, lists: Any) -> bool:
    """Return whether the numbers of all lists of a column are valid. They are if the least and the largest are."""
    numbers = lists.flatten()
    if numbers.null_count or (pa.types.is_floating(numbers.type) and pc.any(pc.is_nan(numbers)).as_py()):
        return False
    try:
        _SAMPLES[name].validate_python(tuple(pc.min_max(numbers).as_py().values()) if len(numbers) else ())
    except ValidationError:
        return False
    return True


def _agree(lists: Mapping[str, Any]) -> bool:
    """Return whether the lists of each row have equal lengths and rounds, as Record demands it."""
    for names in (("samples_ms", "sample_rounds", "sample_marked"), ("busy_samples_ms", "busy_sample_rounds")):
        lengths = [pc.list_value_length(lists[name]) for name in names]
        if not all(pc.all(pc.equal(one, two)).as_py() in (True, None) for one, two in combinations(lengths, 2)):
            return False
    has_busy = lists["busy_sample_rounds"].is_valid()
    busy, rounds = (lists[name].filter(has_busy).to_pylist() for name in ("busy_sample_rounds", "sample_rounds"))
    return all(set(some) <= set(of or (0,)) for some, of in zip(busy, rounds, strict=True))


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
