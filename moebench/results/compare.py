"""Several results side by side, a row a job. No torch here."""

from collections.abc import Mapping

import pandas as pd

from moebench.errors import ResultsError
from moebench.results.labels import CASE_ORDER
from moebench.workload.case import KEY, Case

#: Columns that stand side by side, one for each result: `time_ms:NAME`.
MEASURES = ("status", "time_ms", "tokens_per_s", "peak_memory_bytes", "saved_memory_bytes", "parity_worst")
#: Of those, what also has a ratio to the first result, `time_ms_ratio:NAME`.
RATIOS = ("time_ms", "tokens_per_s", "peak_memory_bytes", "saved_memory_bytes", "parity_worst")

_CASE_COLUMNS = tuple(name for name in Case.model_fields if name not in KEY)


def compare(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Named results as one frame: a row a job that any of them has, in case order.

    Columns: `case_id`, `backend`, `dispatcher` and the fields of the case; for each of MEASURES and each name
    `MEASURE:NAME`, in the units of docs/results.md, null where that result has no such job or did not measure it; for
    each of RATIOS and each name but the first `MEASURE_ratio:NAME`, that result's over the first's: below 1 is less
    time, fewer tokens/s, less memory, a smaller error. Ratios of times say nothing about noise: `moebench gate` does.

    Raises ResultsError for fewer than two results.
    """
    if len(frames) < 2:
        raise ResultsError(f"{len(frames)} results to compare: give two or more")
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
            together[f"{measure}_ratio:{name}"] = (over / under.where(under != 0)).astype("float64")
    return together.reset_index()


def names_of(paths: list[str]) -> list[str]:
    """A short name for each result: the last part of its path, or so many parts as tell them apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for many in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-many:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    raise ResultsError("the same result is given twice; give different ones")
