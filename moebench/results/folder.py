"""Open a results folder: read its rows, and the environments in which the rows were measured.

A frame gives its rows as dictionaries.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from moebench.errors import ResultsError
from moebench.machine.environment import Environment
from moebench.results.files import ENVIRONMENT_NAME, ENVIRONMENTS_NAME
from moebench.results.frame import SAMPLE_COLUMNS, load

Row = Mapping[Hashable, Any]
T = TypeVar("T")


def environments_beside(path: Path) -> dict[str, Environment]:
    """Return the environments in the files beside the results, by `env_id`. `path` is a folder or a Parquet file.

    Raises ResultsError if one of these files does not hold an environment.
    """
    folder = path if path.is_dir() else path.parent
    files = [folder / ENVIRONMENT_NAME, *sorted((folder / ENVIRONMENTS_NAME).glob("*.json"))]
    found = [Environment.from_file(file) for file in files if file.is_file()]
    by_id: dict[str, Environment] = {}
    for environment in found:  # environments with equal env_id differ only in the revision: keep the run's, the first
        by_id.setdefault(environment.env_id, environment)
    return by_id


@dataclass(frozen=True)
class Result:
    """The rows of results in `frame`, and the environments in which the rows were measured, by `env_id`.

    `environments` is empty if no files of environments lie beside the results.
    """

    frame: pd.DataFrame
    environments: Mapping[str, Environment]


def open_result(path: Path) -> Result:
    """Return the results in a folder or a Parquet file, with the environments beside them.

    Raises ResultsError if `path` does not hold results, or if the results have no rows.
    """
    frame = load(path)
    if frame.empty:
        raise ResultsError(f"{path}: no rows of results yet; let `moebench run` finish a job first")
    return Result(frame, environments_beside(path))


def without_samples(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame without the columns of samples. Whoever sorts its rows then moves a hundredth of the bytes."""
    return frame.drop(columns=list(SAMPLE_COLUMNS), errors="ignore")


def rows_of(frame: pd.DataFrame, *, samples: bool = False) -> list[dict[Hashable, Any]]:
    """Return each row of a frame as a dictionary, with the samples as arrays, or else without the columns of samples.

    As in `DataFrame.to_dict`, a missing value is None, or NaN in a column of floats.
    pandas would take ten times as long, above all to make Python numbers of samples.
    """
    columns: dict[Hashable, list[Any]] = {name: _cells(frame[name]) for name in frame if name not in SAMPLE_COLUMNS}
    if samples:
        columns |= {name: _arrays(frame[name]) for name in SAMPLE_COLUMNS}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def once_for_each_row(function: Callable[[Row], T]) -> Callable[[Row], T]:
    """Return a function that computes `function` only once for each row. It is a cache by the row's identity."""
    found: dict[int, tuple[Row, T]] = {}  # with the row, so that no other row takes its identity

    def of_row(row: Row) -> T:
        if id(row) not in found:
            found[id(row)] = row, function(row)
        return found[id(row)][1]

    return of_row


def _cells(column: "pd.Series[Any]") -> list[Any]:
    return [None if cell is pd.NA else cell for cell in column.tolist()]


def _arrays(lists: "pd.Series[Any]") -> list[Any]:
    """Return the cells of a column of lists as arrays, with None for null."""
    cells = pa.chunked_array(pa.array(lists, from_pandas=True)).combine_chunks()
    numbers, lengths = cells.flatten().to_numpy(zero_copy_only=False), pc.list_value_length(cells).fill_null(0)
    ends = np.cumsum(lengths)
    places = zip(ends - lengths, ends, cells.is_valid().to_pylist(), strict=True)
    return [numbers[start:end] if is_valid else None for start, end, is_valid in places]
