"""Read what a caller gives as results: a path, a frame, or an object that another function returned."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moebench.errors import ResultsError
from moebench.results.compare import names_of
from moebench.results.folder import Result, environments_beside
from moebench.results.frame import COLUMNS, load
from moebench.workload.axes import cut, listed
from moebench.workload.case import KEY

GIVE = "give a results folder, its results.parquet, or a frame of moebench.load"
#: Columns that a frame of results must have. A caller may have dropped others.
_NEEDED = tuple(name for name in COLUMNS if name in (*KEY, "status", "run_id"))


def frame_of(given: Any, what: str = "results") -> pd.DataFrame:
    """Return the rows of results. A list gives the rows of all its results, one after the other.

    `what` names the argument in messages. Raises ResultsError for anything that is not results, for results without
    rows, and for a list with the same result twice.
    """
    if isinstance(given, list | tuple):
        return _together(given, what)
    frame = result_of(given, what).frame
    if frame.empty:
        raise ResultsError(f"{what}: {_name(given)} has no rows; let a run finish a job, or filter less")
    return frame


def result_of(given: Any, what: str = "results") -> Result:
    """Return one result with the environments beside it. A frame has no environments.

    Raises ResultsError for anything that is not one result.
    """
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        return Result(load(path), environments_beside(path))
    frame = given if isinstance(given, pd.DataFrame) else getattr(given, "frame", None)
    if not isinstance(frame, pd.DataFrame):
        raise ResultsError(f"{what} = {_shown(given)}: it must be results; {GIVE}")
    missing = [name for name in _NEEDED if name not in frame]
    if missing:
        raise ResultsError(
            f"{what}: a frame with the columns {cut(listed(frame.columns))} has no column {missing[0]}, so it is not "
            f"one of results; {GIVE}"
        )
    folder = getattr(given, "folder", None)
    environments = getattr(given, "environments", None) or (environments_beside(folder) if folder else {})
    return Result(frame, environments)


def frames_of(given: Sequence[Any]) -> dict[str, pd.DataFrame]:
    """Return the rows of two or more results by name: `compare(a, b)`, `compare([a, b])` or `compare({"before": a})`.

    Paths are named by their last parts, and everything else by letters: A, B, …
    """
    if len(given) == 1 and isinstance(given[0], Mapping):
        named = {str(name): value for name, value in given[0].items()}
    else:
        sides = list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else list(given)
        named = dict(zip(_names(sides), sides, strict=True))
    if len(named) < 2:
        raise ResultsError(f"{len(named)} results to compare: give two or more, as compare(a, b), and {GIVE} for each")
    frames = {name: frame_of(value, name) for name, value in named.items()}
    for name, frame in frames.items():
        check_single(frame, name)
    return frames


def check_single(frame: pd.DataFrame, what: str) -> None:
    """Raise ResultsError if a job has several rows, so that nobody could say which of them counts."""
    twice = frame[frame.duplicated(list(KEY))]
    if len(twice):
        row = twice.iloc[0]
        raise ResultsError(
            f"{what}: {row['case_id']} has {row['backend']} several times; select one run, for example with "
            "frame[frame['run_id'] == …], or join runs with `moebench merge`"
        )


def _together(given: Sequence[Any], what: str) -> pd.DataFrame:
    if not given:
        raise ResultsError(f"{what} = []: it is empty; {GIVE}")
    frames = [frame_of(one, f"{what}[{number}]") for number, one in enumerate(given)]
    together = pd.concat(frames, ignore_index=True)
    if together.duplicated([*KEY, "run_id"]).any():
        raise ResultsError(f"{what}: the same result is given twice; give each result once")
    return together


def _names(sides: Sequence[Any]) -> list[str]:
    paths = [os.fspath(side) for side in sides if isinstance(side, str | os.PathLike)]
    if len(paths) == len(sides) and len(sides) > 1:
        return names_of([str(path) for path in paths])
    return [chr(ord("A") + number % 26) + str(number // 26 or "") for number in range(len(sides))]


def _name(given: Any) -> str:
    return str(given) if isinstance(given, str | os.PathLike) else "the frame"


def _shown(given: Any) -> str:
    return cut(f"{type(given).__name__} {given!r}".replace("\n", " "))
