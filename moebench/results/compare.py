"""Put several results side by side in one frame, with one row per job."""

from collections.abc import Mapping

import pandas as pd

from moebench.errors import ResultsError
from moebench.results.labels import CASE_ORDER
from moebench.workload.case import KEY, Case

#: Measures that have one column for each result: `time_ms:NAME`.
MEASURES = ("status", "time_ms", "busy_ms", "tokens_per_s", "peak_memory_bytes", "saved_memory_bytes", "parity_worst")
#: The measures that also have a ratio to the first result: `time_ms_ratio:NAME`.
RATIOS = ("time_ms", "busy_ms", "tokens_per_s", "peak_memory_bytes", "saved_memory_bytes", "parity_worst")

_CASE_COLUMNS = tuple(name for name in Case.model_fields if name not in KEY)


def compare(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return one frame that has the values of all results side by side, with one row per job.

    `frames` has the rows of each result by the result's name. A job has a row if at least one result has the job. Rows
    are sorted by case (`labels.CASE_ORDER`), then by backend and dispatcher.

    The columns are:

    - `case_id`, `backend`, `dispatcher` and the fields of the case
    - `MEASURE:NAME` for each of `MEASURES` and the name of each result: the value of this result, in the unit that
      docs/results.md names. It is null if the result does not have the job, or did not measure the value.
    - `MEASURE_ratio:NAME` for each of `RATIOS` and the name of each result except the first: the value of this result,
      divided by the value of the first result. A ratio below 1 means less time, fewer tokens/s, less memory or a
      smaller error.

    The ratios of a job are null if the rows of the two results have different schemas, because moebench measured them
    differently. A ratio of times does not show whether the difference is noise. `moebench gate` tests whether it is.

    Raises ResultsError for fewer than two results, and if no other result has a job of the first.
    """
    if len(frames) < 2:
        raise ResultsError(f"{len(frames)} results to compare; give two or more")
    if not any(num_common(frames).values()):
        counts = ", ".join(f"{name} {len(frame)}" for name, frame in frames.items())
        raise ResultsError(
            f"no job in common: the results have these numbers of jobs: {counts}; but no other result has a job with "
            "the same case, backend and dispatcher as the first; give results of one sweep"
        )
    some = [frame[[*KEY, *_CASE_COLUMNS]] for frame in frames.values()]
    jobs = pd.concat(some, ignore_index=True).drop_duplicates(list(KEY))
    together = jobs.sort_values([*CASE_ORDER, "backend", "dispatcher"], kind="stable").set_index(list(KEY))
    sides = {name: frame.set_index(list(KEY)) for name, frame in frames.items()}
    for measure in MEASURES:
        for name, side in sides.items():
            together[f"{measure}:{name}"] = side[measure].reindex(together.index)
    first, *others = frames
    for measure in RATIOS:
        for name in others:
            over, under = (together[f"{measure}:{which}"].astype("Float64") for which in (name, first))
            alike = sides[name]["schema"].reindex(together.index) == sides[first]["schema"].reindex(together.index)
            ratio = (over / under.where(under != 0)).astype("float64")
            together[f"{measure}_ratio:{name}"] = ratio.where(alike.fillna(False).astype(bool))
    return together.reset_index()


def num_common(frames: Mapping[str, pd.DataFrame]) -> dict[str, int]:
    """Return how many jobs of the first result each other result has, by the name of the other result."""
    first, *others = ((name, set(map(tuple, frame[list(KEY)].to_numpy()))) for name, frame in frames.items())
    return {name: len(jobs & first[1]) for name, jobs in others}


def names_of(paths: list[str]) -> list[str]:
    """Return a short name for each path: its last parts, as many as are needed to give each path another name.

    Raises ResultsError if two paths are equal.
    """
    parts = [path.rstrip("/").split("/") for path in paths]
    for many in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-many:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    raise ResultsError("the same result is given twice; give each result once")
