"""What a sweep will take, told before anything runs: jobs, memory of a rank, time. Estimates, all of it. No torch here.

Memory comes of the case's shape (moebench.run.footprint), time from jobs that were measured: a job is expected to take
as long as the nearest measured one of its backend, mode and dtype. Where none is near there is no time.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moebench.errors import ResultsError
from moebench.results.labels import machine
from moebench.results.published import default_folders, load_all
from moebench.results.record import Status
from moebench.run.footprint import ITEMSIZE, footprint
from moebench.workload.case import Case, Job

#: How many times as many bytes of parameters, rows and ranks the nearest job may have, or as few.
NEAR = {"parameters": 8.0, "rows": 16.0, "ranks": 4.0}
#: Another dispatcher is as far as so many times the work.
_OTHER_DISPATCHER = 1.5

_GROUP = ("backend", "mode", "dtype")


@dataclass(frozen=True)
class Estimate:
    """Of one job: bytes of its largest rank; seconds without its worker's start, None where no job is near."""

    memory_bytes: int
    time_s: float | None


@dataclass(frozen=True)
class ForecastLine:
    """Of the jobs of an EP size and backend. `time_s` is of those that have one, `num_untimed` have none."""

    ep_size: int
    backend: str
    num_jobs: int
    memory_bytes: int
    time_s: float | None
    num_untimed: int


class KnownTimes:
    """The seconds of measured jobs, found by what they are near to."""

    def __init__(self, frame: pd.DataFrame) -> None:
        """`frame` has results; those that ended well count."""
        rows = frame[frame["status"].eq(Status.ok).astype("bool") & frame["job_s"].notna()]
        self.num_jobs = len(rows)
        self.where = machine(rows) if len(rows) else ""
        self._groups: dict[Hashable, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for key, some in rows.groupby(list(_GROUP)):
            cases = [Case.model_validate(row) for row in some[list(Case.model_fields)].to_dict("records")]
            places = np.array([_place(case) for case in cases])
            self._groups[key] = places, some["dispatcher"].to_numpy(dtype=str), some["job_s"].to_numpy(dtype=float)

    def time_s(self, job: Job) -> float | None:
        """Seconds of the nearest job; None where none is near."""
        key = job.backend, job.case.mode, job.case.dtype
        if key not in self._groups:
            return None
        places, dispatchers, times_s = self._groups[key]
        apart = np.abs(places - np.array(_place(job.case)))
        is_near = (apart <= np.log2(list(NEAR.values()))).all(axis=1)
        if not is_near.any():
            return None
        distance = apart.sum(axis=1) + np.where(dispatchers == job.dispatcher, 0.0, math.log2(_OTHER_DISPATCHER))
        return float(times_s[np.where(is_near, distance, np.inf).argmin()])


def _place(case: Case) -> tuple[float, float, float]:
    """Where a case stands, in powers of two: bytes of a rank's parameters, its rows, and ranks."""
    numbers = case.dim * case.moe_inter_dim * (3 if case.is_gated else 2) * case.n_routed_experts / case.ep_size
    rows = max(1, case.num_tokens) * case.n_activated_experts
    return math.log2(numbers * ITEMSIZE[case.dtype]), math.log2(rows), math.log2(case.ep_size)


def measured_jobs(folders: Sequence[Path] | None = None) -> KnownTimes | None:
    """Those in the results folders, default the published ones; None where there are none to open."""
    try:
        return KnownTimes(load_all(default_folders() if folders is None else folders))
    except ResultsError:
        return None


@dataclass(frozen=True)
class Forecast:
    """An estimate for each job of a sweep."""

    jobs: tuple[Job, ...]
    estimates: tuple[Estimate, ...]
    based_on: str  # which measured jobs the times are of; empty without any

    @property
    def lines(self) -> list[ForecastLine]:
        """A line for each EP size and backend, in the order of the jobs but by EP size."""
        groups: dict[tuple[int, str], list[Estimate]] = {}
        for job, estimate in zip(self.jobs, self.estimates, strict=True):
            groups.setdefault((job.case.ep_size, job.backend), []).append(estimate)
        ordered = sorted(groups.items(), key=lambda item: item[0][0])
        return [
            ForecastLine(*key, len(some), max(one.memory_bytes for one in some), *_time(some)) for key, some in ordered
        ]

    @property
    def memory_bytes(self) -> int:
        """Of the rank that needs most in the whole sweep; 0 without jobs."""
        return max((estimate.memory_bytes for estimate in self.estimates), default=0)

    @property
    def time_s(self) -> float | None:
        """Of all jobs, one after the other, that have one."""
        return _time(self.estimates)[0]

    @property
    def num_untimed(self) -> int:
        return _time(self.estimates)[1]

    def as_dict(self) -> dict[str, Any]:
        names = ("memory_bytes", "time_s", "num_untimed", "based_on")
        whole = {name: getattr(self, name) for name in names}
        return {"num_jobs": len(self.jobs), **whole, "lines": [asdict(line) for line in self.lines]}


def forecast(jobs: Sequence[Job], measured: KnownTimes | None) -> Forecast:
    """Estimates of the jobs; `measured` says how long like ones took, None for no times."""
    estimates = (
        Estimate(footprint(job).peak_bytes, None if measured is None else measured.time_s(job)) for job in jobs
    )
    based_on = "" if measured is None else f"{measured.num_jobs} measured jobs ({measured.where})"
    return Forecast(tuple(jobs), tuple(estimates), based_on)


def _time(estimates: Sequence[Estimate]) -> tuple[float | None, int]:
    """Seconds of all that have a time, None where none has, and how many have none."""
    times_s = [estimate.time_s for estimate in estimates if estimate.time_s is not None]
    return (sum(times_s) if times_s else None), len(estimates) - len(times_s)
