"""Rank the backends of each case by their times, and say where noise blurs the ranking.

Only rows of one run are ranked against each other. If the results cannot tell which of several backends is the fastest,
they are too close to call, and none of them is the fastest: either their 95% intervals overlap, or their times differ
by less than `CLOSE`. `moebench.results.advise` has the same rule.
"""

from collections import Counter

import numpy as np
import pandas as pd

from moebench.results.advise import CLOSE
from moebench.results.labels import backend_labels, in_case_order, in_order
from moebench.results.record import Status

TOO_CLOSE = "too close to call"
_CASE = ["run_id", "case_id"]


def ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows in the order of cases, with four more columns.

    - `label`: the backend with its dispatcher
    - `times_fastest`: the time divided by the lowest time of the case; null for a row without a time
    - `fastest`: whether the row is the fastest of its case, by more than noise
    - `close`: whether the row is too close to the fastest to call. In such a case, no row is the fastest.
    """
    rows = in_case_order(frame)
    return rows.assign(
        label=backend_labels(rows),
        times_fastest=(_times(rows) / _lowest(rows)).astype("float64"),
        fastest=fastest_rows(rows),
        close=close_rows(rows),
    )


def fastest_rows(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows are the fastest of their case. A case of one time, or too close to call, has no such row."""
    near = _near(frame)
    num_timed = _times(frame).groupby([frame[name] for name in _CASE]).transform("count")
    return near & (_near_of_case(frame, near) == 1) & (num_timed > 1)


def close_rows(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows are too close to the fastest of their case to call, the row of the lowest time included."""
    near = _near(frame)
    return near & (_near_of_case(frame, near) > 1)


def num_compared(frame: pd.DataFrame) -> int:
    """Return the number of cases in which two or more backends have a time."""
    timed = frame.loc[_times(frame).notna(), _CASE].value_counts()
    return int((timed > 1).sum())


def best(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each case with a time: the row of its lowest time, with five more columns.

    - `label`: the backend with its dispatcher
    - `close`: whether the case is too close to call
    - `close_to`: the labels of the other rows that are too close to the lowest time to call, separated by commas
    - `next`: the label of the fastest of the others that are not in `close_to`; null if there is none
    - `lead`: the time of `next` divided by the time of the row; null where `next` is null
    """
    return best_of(ranked(frame))


def best_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what `best` returns, of rows as `ranked` returns them."""
    timed = rows[_times(rows).notna()]
    case = timed.groupby(_CASE, sort=False).ngroup()
    timed = timed.iloc[np.lexsort((timed["time_ms"], case))]  # the fastest of a case first, equal times in their order
    case = case[timed.index]
    is_first = ~case.duplicated()
    first = timed[is_first].drop(columns=["times_fastest", "fastest"])
    near = timed[timed["close"] & ~is_first]
    close_to = near["label"].groupby(case[near.index]).agg(", ".join)
    others = timed[~timed["close"] & ~is_first]
    following = others[["label", "time_ms"]].groupby(case[others.index]).first()
    found = first.set_index(case[is_first])
    found = found.assign(
        close_to=close_to.reindex(found.index, fill_value=""),
        next=following["label"].reindex(found.index),
        lead=following["time_ms"].reindex(found.index) / found["time_ms"],
    )
    return found.reset_index(drop=True)


def wins(rows: pd.DataFrame) -> tuple[dict[str, int], int]:
    """Return in how many cases each backend is the fastest, the most first, and how many cases are too close to call.

    `rows` are as `ranked` returns them.
    """
    counts = Counter(map(str, rows.loc[rows["fastest"], "label"]))
    names = sorted(in_order(counts), key=lambda name: -counts[name])
    return {name: counts[name] for name in names}, len(rows.loc[rows["close"], _CASE].drop_duplicates())


def _times(rows: pd.DataFrame) -> "pd.Series[float]":
    return rows["time_ms"].where(rows["status"] == Status.ok).astype("float64")


def _lowest(rows: pd.DataFrame) -> "pd.Series[float]":
    return _times(rows).groupby([rows[name] for name in _CASE]).transform("min")


def _near(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows have the lowest time of their case, or a time that may be as low.

    A row behind a clearly slower one is not among them, however noisy its time is.
    """
    times, lowest = _times(rows), _lowest(rows)
    is_lowest = times == lowest
    groups = [rows[name] for name in _CASE]
    high = rows["time_ms_high"].where(is_lowest).astype("float64").groupby(groups).transform("max")
    overlaps = rows["time_ms_low"].astype("float64") <= high
    near = (times.notna() & (is_lowest | overlaps | (times < lowest * (1 + CLOSE)))).astype(int)
    fastest_first = near.loc[times.sort_values(kind="stable").index]
    unbroken = fastest_first.groupby([rows.loc[fastest_first.index, name] for name in _CASE]).cummin()
    return unbroken.reindex(near.index).astype(bool)


def _near_of_case(rows: pd.DataFrame, near: "pd.Series[bool]") -> "pd.Series[int]":
    return near.astype(int).groupby([rows[name] for name in _CASE]).transform("sum")
