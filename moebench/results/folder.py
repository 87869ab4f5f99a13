"""Open a results folder: read its rows, and the environments in which the rows were measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moebench.errors import ResultsError
from moebench.machine.environment import Environment
from moebench.results.files import ENVIRONMENT_NAME, ENVIRONMENTS_NAME
from moebench.results.frame import load


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
