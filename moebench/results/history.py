"""Collect the times of cases from many results, in the order of measurement, and find where they changed for good."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from moebench.errors import ResultsError
from moebench.results.files import PARQUET_NAME
from moebench.results.folder import Result
from moebench.results.journal import JOURNAL_NAME
from moebench.results.labels import backend_labels
from moebench.results.record import Status
from moebench.results.stats import THRESHOLD
from moebench.workload.axes import did_you_mean

_TIME = re.compile(r"(20\d\d)([01]\d)([0-3]\d)-([0-2]\d)([0-5]\d)")


def history(case_id: str, frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return one row for each result and backend (with its dispatcher) that has the case, the oldest result first.

    The frame has the columns of results (docs/results.md) and these five:

    - `result`: the name of the result
    - `line`: the backend with its dispatcher, for example `te+deepep`
    - `place`: the number of the result in the order of time, from 0
    - `change`: the time divided by the previous time of the same line, minus 1; a row without a time is not a
      previous time
    - `since_first`: the time divided by the first time of the same line, minus 1

    Only times of the same schema are divided by each other, because moebench measures differently in each schema.

    Raises ResultsError if no result has the case.
    """
    known = sorted({case for frame in frames.values() for case in frame["case_id"]})
    if case_id not in known:
        hint = did_you_mean(case_id, known) or "run `moebench list SWEEP --ids` for the cases of a sweep"
        raise ResultsError(f"{case_id}: none of {len(frames)} results has this case; {hint}")
    rows = _in_order({name: frame[frame["case_id"] == case_id] for name, frame in frames.items()})
    times = rows["time_ms"].where(rows["status"] == Status.ok).groupby([rows["line"], rows["schema"]])
    rows["change"] = rows["time_ms"] / times.transform(lambda some: some.ffill().shift()) - 1
    rows["since_first"] = rows["time_ms"] / times.transform("first") - 1
    return rows.sort_values(["place", "line"], kind="stable", ignore_index=True)


def _in_order(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all results, the oldest result first, with the columns `result`, `line` and `place`."""
    found = [frame.assign(result=name) for name, frame in frames.items()]
    rows = pd.concat(found, ignore_index=True).sort_values("run_id", kind="stable", ignore_index=True)
    rows["line"] = backend_labels(rows)
    order = list(dict.fromkeys(rows["result"]))
    rows["place"] = rows["result"].map(order.index)
    return rows


#: A change is looked for between this many results before it and as many from it on.
WINDOW = 3
#: A change must exceed this many times the median step from one result to the next.
NOISES = 3.0


def series(results: Mapping[str, Result]) -> pd.DataFrame:
    """Return the rows of all results, the oldest result first, each result with its place and revision.

    The frame has the columns of results (docs/results.md), `result`, `line` and `place` as `history` has them, and:

    - `revision`: the git revision of the row's environment, or null
    - `is_change`: whether the job's time changed here for good (`changes`)
    - `ratio`: at a change, the median time of up to WINDOW results from it on, divided by the median before it
    - `is_confirmed`: at a change, whether a later result has it, too
    """
    rows = _in_order({name: _with_revision(result) for name, result in results.items()})
    rows = rows.assign(is_change=False, ratio=math.nan, is_confirmed=False)
    timed = rows[rows["status"].eq(Status.ok) & rows["time_ms"].notna()]
    for _, job in timed.groupby(["case_id", "line", "device", "gpu", "schema"], dropna=False):
        for at, ratio in changes(job["time_ms"], job["time_ms_low"], job["time_ms_high"]).items():
            rows.loc[job.index[at], ["is_change", "ratio", "is_confirmed"]] = True, ratio, at + 1 < len(job)
    return rows


def _with_revision(result: Result) -> pd.DataFrame:
    revisions = {env_id: environment.git_revision for env_id, environment in result.environments.items()}
    return result.frame.assign(revision=result.frame["env_id"].map(revisions).astype("object"))


def changes(time_ms: "pd.Series[float]", low: "pd.Series[float]", high: "pd.Series[float]") -> dict[int, float]:
    """Return the positions at which a series of times changed for good, each with the ratio of the times.

    At a change, the intervals of up to WINDOW results from the position on lie all above or all below the intervals of
    up to WINDOW results before it, back to the change before. So one result that is off is no change, unless it is the
    newest. The medians of the two sides differ by more than THRESHOLD, and by more than NOISES times the median step
    from one result to the next. The time at the position is nearer to the median after it than to the median before it.
    """
    logs, lows, highs = (np.log(np.maximum(some.to_numpy(dtype="float64"), 1e-300)) for some in (time_ms, low, high))
    steps = np.abs(np.diff(logs))
    least = max(math.log1p(THRESHOLD), NOISES * float(np.median(steps)) if len(steps) > WINDOW else 0.0)
    found: dict[int, float] = {}
    start = 0
    for at in range(1, len(logs)):
        before, after = slice(max(start, at - WINDOW), at), slice(at, at + WINDOW)
        shift = float(np.median(logs[after]) - np.median(logs[before]))
        is_first = abs(logs[at] - np.median(logs[before])) > abs(shift) / 2
        is_above, is_below = lows[after].min() > highs[before].max(), highs[after].max() < lows[before].min()
        if abs(shift) > least and is_first and (is_above or is_below):
            found[at] = math.exp(shift)
            start = at
    return found


def expanded(paths: list[Path]) -> list[Path]:
    """Return the results in the paths. A folder without results of its own stands for the results folders in it."""
    found: list[Path] = []
    for path in paths:
        inner = [] if _holds_results(path) else sorted(one for one in path.glob("*/") if _holds_results(one))
        found += inner or [path]
    return found


def _holds_results(path: Path) -> bool:
    return path.is_file() or any((path / name).is_file() for name in (JOURNAL_NAME, PARQUET_NAME))


def when(run_id: str) -> str:
    """Return the date and time that a run's id begins with, or the id itself if it begins with something else."""
    found = _TIME.match(run_id)
    return "{}-{}-{} {}:{}".format(*found.groups()) if found else run_id
