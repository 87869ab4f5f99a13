"""Collect the times of one case from many results, in the order in which the results were measured."""

import re
from collections.abc import Mapping

import pandas as pd

from moebench.errors import ResultsError
from moebench.results.labels import backend_labels
from moebench.results.record import Status
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
    found = [frame[frame["case_id"] == case_id].assign(result=name) for name, frame in frames.items()]
    rows = pd.concat(found, ignore_index=True).sort_values("run_id", kind="stable", ignore_index=True)
    rows["line"] = backend_labels(rows)
    order = list(dict.fromkeys(rows["result"]))
    rows["place"] = rows["result"].map(order.index)
    times = rows["time_ms"].where(rows["status"] == Status.ok).groupby([rows["line"], rows["schema"]])
    rows["change"] = rows["time_ms"] / times.transform(lambda some: some.ffill().shift()) - 1
    rows["since_first"] = rows["time_ms"] / times.transform("first") - 1
    return rows.sort_values(["place", "line"], kind="stable", ignore_index=True)


def when(run_id: str) -> str:
    """Return the date and time that a run's id begins with, or the id itself if it begins with something else."""
    found = _TIME.match(run_id)
    return "{}-{}-{} {}:{}".format(*found.groups()) if found else run_id
