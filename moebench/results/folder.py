"""Open a results folder: its rows, and the environments in which they were measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moebench.errors import ResultsError
from moebench.machine.environment import Environment
from moebench.results.frame import load

ENVIRONMENT_NAME = "environment.json"


#: The folder with one file per environment, in results from several environments.
ENVIRONMENTS_NAME = "environments"


def environments_beside(path: Path) -> dict[str, Environment]:
    """Return the environments beside the results in `path`, a folder or a Parquet file, by their env_id.

    Raises ResultsError for a file that does not hold an environment.
    """
    folder = path if path.is_dir() else path.parent
    files = [folder / ENVIRONMENT_NAME, *sorted((folder / ENVIRONMENTS_NAME).glob("*.json"))]
    found = [Environment.from_file(file) for file in files if file.is_file()]
    by_id: dict[str, Environment] = {}
    for environment in found:  # files of one env_id differ only in the revision: keep the first, the run's
        by_id.setdefault(environment.env_id, environment)
    return by_id


@dataclass(frozen=True)
class Result:
    """Results, and the environments in which they were measured, by env_id; empty if there are no files of them."""

    frame: pd.DataFrame
    environments: Mapping[str, Environment]


def open_result(path: Path) -> Result:
    """Return the results in a folder or a Parquet file, with the environments beside them.

    Raises ResultsError for anything that is not results, and for results without rows.
    """
    frame = load(path)
    if frame.empty:
        raise ResultsError(f"{path}: no rows of results yet; let `moebench run` finish a job first")
    return Result(frame, environments_beside(path))
