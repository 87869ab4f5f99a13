"""Look at results that are there: open, compare, tabulate, draw and judge them, and get advice from them."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from moebench.api.given import GIVE, check_single, frame_of, frames_of, result_of
from moebench.api.shown import Advised, Gated
from moebench.errors import ResultsError, UsageError
from moebench.machine.comparability import CHANGES
from moebench.results import advise as advices
from moebench.results import compare as comparison
from moebench.results import frame as frames
from moebench.results.folder import Result
from moebench.results.published import default_folders
from moebench.results.stats import THRESHOLD
from moebench.verdicts.comparability import Comparability
from moebench.verdicts.gate import gate
from moebench.workload.axes import listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OPTION = re.compile(r"--([a-z][a-z-]*)")


def load(path: str | os.PathLike[str] | Sequence[Any]) -> pd.DataFrame:
    """Return results as a frame with one row per job. docs/results.md lists the columns.

    `path` is a results folder or its results.parquet. A list gives the rows of all its results, one after the other.
    Raises ResultsError for anything else.
    """
    if isinstance(path, str | os.PathLike):
        return frames.load(path)
    return frame_of(path, "path")


def open_result(path: str | os.PathLike[str]) -> Result:
    """Return the results in a folder or a Parquet file, with the environments beside them.

    Raises ResultsError if `path` does not hold results, or if the results have no rows.
    """
    if not isinstance(path, str | os.PathLike):
        raise ResultsError(f"path is a {type(path).__name__}: it must be a results folder or its results.parquet")
    frame_of(path, "path")
    return result_of(path, "path")


def compare(*results: Any) -> pd.DataFrame:
    """Return two or more results side by side, with one row per job, and the ratios to the first result.

    Give the results as `compare(a, b)`, `compare([a, b])` or `compare({"before": a, "after": b})`. The columns are
    those of moebench.results.compare.compare. Raises ResultsError for anything else, for results without rows, for a
    result that has a job several times, and if no other result has a job of the first.
    """
    return comparison.compare(frames_of(results))


def pivot(results: Any, values: str = "time_ms", index: str | Sequence[str] | None = None) -> pd.DataFrame:
    """Return a table with one row per case and one column per backend, with the cells of the column `values`.

    `results` is a frame, a path, or a list of them. `index` are the columns that distinguish cases; by default, all
    that vary. Raises ResultsError if several rows belong to one cell, and for a column that cannot be used.
    """
    from moebench.report.plots import notebook  # imports matplotlib

    frame = frame_of(results)
    names = [index] if isinstance(index, str) else index
    for argument, name in [("values", values), *(("index", name) for name in names or [])]:
        if not isinstance(name, str) or name not in frame:
            raise ResultsError(f"{argument} = {name!r}: no column {name!r}: the columns are {listed(frame.columns)}")
        if name in ("backend", "dispatcher"):
            raise ResultsError(
                f"{argument} = {name!r}: each backend with its dispatcher is a column of the table already; "
                f"give a column such as {'time_ms' if argument == 'values' else 'num_tokens'}"
            )
    if names is not None and (not names or values in names):
        wrong = f"also has values = {values!r}" if names else "is empty"
        raise ResultsError(f"index = {names!r}: it {wrong}; give columns that distinguish cases, such as num_tokens")
    return notebook.pivot(frame, values, names)


def plot(results: Any, kind: str = "throughput", *, ax: "Axes | None" = None) -> "Axes":
    """Draw one panel of `results`, which is a frame, a path, or a list of them, and return its matplotlib axes.

    `kind` is `throughput`, `memory`, `parity`, `roofline` or `breakdown`. If `ax` is None, the panel is on a new
    figure. Raises ResultsError if the rows do not fit into one panel.
    """
    from matplotlib.axes import Axes

    from moebench.report.plots import notebook

    if ax is not None and not isinstance(ax, Axes):
        raise ResultsError(f"ax is a {type(ax).__name__}: it must be matplotlib axes; leave it out for a new figure")
    return notebook.plot(frame_of(results), kind, ax=ax)


def parity_errors(cell: str | None) -> dict[str, float]:
    """Return the error of each tensor divided by its budget, from a cell of the column `parity_errors`.

    The dictionary is empty if the cell is null. Raises ResultsError for anything that is not such a cell.
    """
    if not (cell is None or isinstance(cell, str | float | type(pd.NA))):
        raise ResultsError(
            f"cell is a {type(cell).__name__}: it must be one cell of the column parity_errors; give for example "
            "frame['parity_errors'].iloc[0]"
        )
    try:
        return frames.parity_errors(cell)
    except (ValueError, TypeError, AttributeError) as error:
        raise ResultsError(
            f"cell = {cell!r}: it is not a cell of the column parity_errors, which holds a JSON object"
        ) from error


def gate_results(
    baseline: Any, candidate: Any, *, threshold: float = THRESHOLD, allow_env_change: str | Iterable[str] = ()
) -> Gated:
    """Return the verdict on every job of two results: is the candidate slower, larger or wrong?

    `threshold` is the smallest slowdown that must not pass, as a share. `allow_env_change` names the facts of the
    environment that may differ, or is "all". A frame has no environments, so that only its rows are compared. Raises
    ResultsError for anything that is not results, and if the results have no job in common.
    """
    if not (isinstance(threshold, float | int) and 0 < threshold < 1):
        raise ResultsError(f"threshold = {threshold!r}: it must be a share between 0 and 1, such as 0.03")
    named = [allow_env_change] if isinstance(allow_env_change, str) else list(allow_env_change)
    unknown = [name for name in named if name not in (*CHANGES, "all")]
    if unknown:
        raise ResultsError(f"allow_env_change = {unknown[0]!r}: it must be one of {', '.join(CHANGES)}, or all")
    sides = []
    for what, given in (("baseline", baseline), ("candidate", candidate)):
        if isinstance(given, list | tuple):
            raise ResultsError(f"{what} is a list: a gate judges one result against one; {GIVE}")
        check = frame_of(given, what)
        check_single(check, what)
        sides.append(result_of(given, what))
    before, after = sides
    allowed = frozenset((*CHANGES, "env_id") if "all" in named else named)
    comparability = Comparability(before.environments, after.environments, allowed)
    return Gated(gate(before.frame, after.frame, comparability, threshold=threshold))


def advise(model: str | os.PathLike[str], num_tokens: int, *, results: Any = None, **case: Any) -> Advised:
    """Return which backend is the fastest for a workload, by measured results only.

    `model` and `case` are as in `bench`: `ep_size`, `mode`, `dtype`, `routing`. `results` are the results to look at;
    by default, those that come with moebench. Raises ResultsError for anything that is not results, and UsageError for
    a workload that cannot be.
    """
    if not isinstance(model, str | os.PathLike):
        raise ResultsError(f"model is a {type(model).__name__}: it must be the name of a model, or a shape")
    try:
        asked = advices.question(os.fspath(model), num_tokens, **case)
    except UsageError as error:  # it names the options of the command line
        raise UsageError(_OPTION.sub(lambda found: found[1].replace("-", "_"), str(error))) from error
    frame = frame_of(list(map(Path, default_folders())) if results is None else results)
    return Advised(os.fspath(model), advices.advise(frame, asked))
