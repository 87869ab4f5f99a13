"""What a results folder holds: its rows, and the environments that they were measured in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moebench.errors import ResultsError
from moebench.machine.environment import Environment
from moebench.results.frame import load

ENVIRONMENT_NAME = "environment.json"


#: In a folder of results from several environments, one file each.
ENVIRONMENTS_NAME = "environments"


def environments_beside(path: Path) -> dict[str, Environment]:
    """The environments that lie beside the results in `path`, a folder or a Parquet file, by their env_id.

    Raises ResultsError for a file that is no environment.
    """
    folder = path if path.is_dir() else path.parent
    files = [folder / ENVIRONMENT_NAME, *sorted((folder / ENVIRONMENTS_NAME).glob("*.json"))]
    found = [Environment.from_file(file) for file in files if file.is_file()]
    by_id: dict[str, Environment] = {}
    for environment in found:  # of several of one id, which differ in revision alone, the run's own
        by_id.setdefault(environment.env_id, environment)
    return by_id


@dataclass(frozen=True)
class Result:
    """Results and the environments that they were measured in, by env_id; empty where no file tells."""

    frame: pd.DataFrame
    environments: Mapping[str, Environment]


def open_result(path: Path) -> Result:
    """The results in a folder or a Parquet file, with the environments beside them.

    Raises ResultsError for what is none, and for one without rows.
    """
    frame = load(path)
    if frame.empty:
        raise ResultsError(f"{path}: no rows of results yet; let `moebench run` measure a job first")
    return Result(frame, environments_beside(path))
