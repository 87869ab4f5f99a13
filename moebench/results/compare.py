"""Put several results side by side in one frame, with one row per job."""

from collections.abc import Mapping

import pandas as pd

from moebench.errors import ResultsError
from moebench.results.labels import CASE_ORDER
from moebench.workload.case import KEY, Case
from moebench.workload.context import PLAIN

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


#: What a context changes, and the column of the ratio to plain.
BESIDE_PLAIN = {
    "time_ms": "time_of_plain",
    "peak_memory_bytes": "peak_of_plain",
    "saved_memory_bytes": "saved_of_plain",
}
#: Two rows with equal values here differ in nothing but the context, and the data-parallel ranks that it needs.
_BUT_CONTEXT = (
    "run_id",
    "backend",
    "dispatcher",
    *(name for name in _CASE_COLUMNS if name not in ("context", "dp_size")),
)


def beside_plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each context beside those of `plain`: of the same backend, on a case that is else the same.

    The rows have status `ok`. Contexts without such a row of `plain` are left out. Rows are sorted by case, then by
    backend and dispatcher; `plain` comes first. The columns are those of `frame` and of `BESIDE_PLAIN`: the row's time,
    peak memory and saved memory, divided by those of plain. A ratio is null where one of the two values is.
    """
    timed = frame[frame["time_ms"].notna()].reset_index(drop=True)
    key = timed[list(_BUT_CONTEXT)].astype(object).where(timed[list(_BUT_CONTEXT)].notna(), None)
    keys = pd.Series(list(map(tuple, key.to_numpy())), dtype=object)
    is_plain = timed["context"] == PLAIN
    rows_of_plain = dict(zip(keys[is_plain], timed.index[is_plain], strict=True))
    places = keys.map(rows_of_plain)
    has_both = keys.isin(set(keys[~is_plain])) & places.notna()
    rows, plain = timed[has_both], timed.loc[places[has_both].astype(int)].set_axis(timed.index[has_both])
    for name, ratio in BESIDE_PLAIN.items():
        over, under = rows[name].astype("Float64"), plain[name].astype("Float64")
        rows = rows.assign(**{ratio: (over / under.where(under != 0)).astype("float64")})
    order = [name for name in CASE_ORDER if name not in ("context", "dp_size", "case_id")]
    rows = rows.assign(is_context=rows["context"] != PLAIN)
    by = ["run_id", *order, "backend", "dispatcher", "is_context", "context", "dp_size"]
    return rows.sort_values(by, kind="stable", ignore_index=True).drop(columns="is_context")


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
