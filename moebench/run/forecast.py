"""Estimate, before anything runs, what a sweep will take: jobs, memory per rank, and time.

The memory is estimated from the case's shape and its context (moebench.run.memory). The time is estimated from measured
jobs: a job should take as long as the nearest measured job with the same backend, mode and dtype. A job without a near
measured job has no time.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from moebench.errors import ResultsError
from moebench.results.bulk.tables import load_table
from moebench.results.labels import machine
from moebench.results.published import default_folders
from moebench.results.record import Status
from moebench.run.memory.footprint import footprint
from moebench.run.memory.passes import kept_bytes
from moebench.run.memory.sizes import layer_of
from moebench.workload.case import ITEMSIZE, Case, Job
from moebench.workload.context import PLAIN

#: A measured job is near a job if the two differ by at most these factors: in bytes of parameters, in rows, in ranks.
NEAR = {"parameters": 8.0, "rows": 16.0, "ranks": 4.0}
_NEAR = np.log2(list(NEAR.values()))
#: A different dispatcher adds as much distance as a difference by this factor in the rows.
_OTHER_DISPATCHER = 1.5

_GROUP = ("backend", "mode", "dtype", "subject", "context")
_MACHINE = ("gpu", "device", "l2", "run_id")
_COLUMNS = list(dict.fromkeys([*Case.model_fields, *_GROUP, *_MACHINE, "dispatcher", "status", "job_s", "num_rounds"]))


@dataclass(frozen=True)
class Estimate:
    """The estimate for one job.

    `memory_bytes` is the memory of the job's largest rank. `kept_bytes` is what a layer keeps from forward to backward,
    which each layer of a model has for itself; 0 in mode forward. `time_s` excludes the start of the job's worker.
    `time_s` is None if no measured job is near.
    """

    memory_bytes: int
    kept_bytes: int
    time_s: float | None


@dataclass(frozen=True)
class ForecastLine:
    """The estimate for all jobs of one EP size and backend.

    `memory_bytes` is the memory of the largest job. `time_s` is the sum over the jobs that have a time; it is None if
    no job has a time. `num_untimed` is the number of jobs without a time.
    """

    ep_size: int
    backend: str
    num_jobs: int
    memory_bytes: int
    time_s: float | None
    num_untimed: int


class KnownTimes:
    """The seconds that a round of measured jobs took. The method `time_s` looks up the nearest measured job."""

    def __init__(self, table: pa.Table) -> None:
        """Take the rows of a table of results that have status ok and a time."""
        table = table.select(_COLUMNS)
        table = table.filter(pc.and_(pc.equal(table["status"], Status.ok.value), pc.is_valid(table["job_s"])))
        self.num_jobs = len(table)
        self.where = machine(table.select(_MACHINE).to_pydict()) if len(table) else ""
        groups: dict[Hashable, list[dict[str, Any]]] = {}
        for row in table.to_pylist():
            groups.setdefault(tuple(row[name] for name in _GROUP), []).append(row)
        self._groups = {key: _measured(rows) for key, rows in groups.items()}

    def time_s(self, job: Job) -> float | None:
        """Return the seconds that one round of the nearest measured job took; None where no measured job is near.

        If the job's context was never measured, jobs in the context `plain` stand for it.
        """
        return self.times_s([job])[0]

    def times_s(self, jobs: Sequence[Job]) -> list[float | None]:
        """Return what `time_s` returns, for each job."""
        found: list[float | None] = [None] * len(jobs)
        alike: dict[Hashable, list[int]] = {}
        for number, job in enumerate(jobs):
            own = job.backend, job.case.mode, job.case.dtype, job.case.subject, job.case.context
            alike.setdefault(own if own in self._groups else (*own[:-1], PLAIN), []).append(number)
        for key in alike.keys() & self._groups.keys():
            for start in range(0, len(alike[key]), _AT_ONCE):
                numbers = alike[key][start : start + _AT_ONCE]
                times_s = _nearest(*self._groups[key], [jobs[number] for number in numbers])
                for number, time_s in zip(numbers, times_s, strict=True):
                    found[number] = time_s
        return found


def _measured(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the places, the dispatchers and the seconds of a round of measured jobs."""
    cases = [Case.model_validate({name: row[name] for name in Case.model_fields}) for row in rows]
    of_a_round_s = [row["job_s"] / row["num_rounds"] for row in rows]
    return (
        np.array([_place(case) for case in cases]),
        np.array([row["dispatcher"] for row in rows]),
        np.array(of_a_round_s),
    )


#: So many jobs are compared with the measured jobs at once. More would need much memory.
_AT_ONCE = 1000


def _nearest(
    places: np.ndarray, dispatchers: np.ndarray, times_s: np.ndarray, jobs: Sequence[Job]
) -> list[float | None]:
    """Return for each job the seconds of the nearest of the measured jobs, or None if none is near."""
    apart = np.abs(places - np.array([_place(job.case) for job in jobs])[:, None])
    is_near = (apart <= _NEAR).all(axis=2)
    is_other = dispatchers != np.array([job.dispatcher for job in jobs])[:, None]
    distance = apart.sum(axis=2) + np.where(is_other, math.log2(_OTHER_DISPATCHER), 0.0)
    nearest = times_s[np.where(is_near, distance, np.inf).argmin(axis=1)]
    return [
        time_s if has_near else None for time_s, has_near in zip(nearest.tolist(), is_near.any(axis=1), strict=True)
    ]


def _place(case: Case) -> tuple[float, float, float]:
    """Return a case's coordinates for the distance: log2 of a rank's parameter bytes, of its rows, and of the ranks."""
    numbers = case.dim * case.moe_inter_dim * (3 if case.is_gated else 2) * case.n_routed_experts / case.ep_size
    rows = max(1, case.num_tokens) * case.n_activated_experts
    return math.log2(numbers * ITEMSIZE[case.dtype]), math.log2(rows), math.log2(case.ep_size)


def measured_jobs(folders: Sequence[Path] | None = None) -> KnownTimes | None:
    """Return the measured jobs in the results folders (default: the published ones); None where none can be opened."""
    try:
        return KnownTimes(pa.concat_tables(map(load_table, default_folders() if folders is None else folders)))
    except ResultsError:
        return None


@dataclass(frozen=True)
class Forecast:
    """An estimate for each job of a sweep."""

    jobs: tuple[Job, ...]
    estimates: tuple[Estimate, ...]
    based_on: str  # which measured jobs the times come from; empty without any

    @property
    def lines(self) -> list[ForecastLine]:
        """One line for each EP size and backend, by EP size and then in the order of the jobs."""
        groups: dict[tuple[int, str], list[Estimate]] = {}
        for job, estimate in zip(self.jobs, self.estimates, strict=True):
            groups.setdefault((job.case.ep_size, job.backend), []).append(estimate)
        ordered = sorted(groups.items(), key=lambda item: item[0][0])
        return [
            ForecastLine(*key, len(some), max(one.memory_bytes for one in some), *_time(some)) for key, some in ordered
        ]

    @property
    def memory_bytes(self) -> int:
        """The largest memory that any rank needs in the whole sweep; 0 without jobs."""
        return max((estimate.memory_bytes for estimate in self.estimates), default=0)

    @property
    def time_s(self) -> float | None:
        """The time of all jobs that have one, measured one after the other; None where no job has a time."""
        return _time(self.estimates)[0]

    @property
    def num_untimed(self) -> int:
        return _time(self.estimates)[1]

    def as_dict(self) -> dict[str, Any]:
        names = ("memory_bytes", "time_s", "num_untimed", "based_on")
        whole = {name: getattr(self, name) for name in names}
        return {"num_jobs": len(self.jobs), **whole, "lines": [asdict(line) for line in self.lines]}


def forecast(jobs: Sequence[Job], measured: KnownTimes | None) -> Forecast:
    """Estimate the jobs. Times come from the `measured` jobs; where it is None, the estimates have no times."""
    times_s = [None] * len(jobs) if measured is None else measured.times_s(jobs)
    layers = [layer_of(job) for job in jobs]
    memory = {
        layer: (footprint(job).peak_bytes, kept_bytes(job))
        for layer, job in dict(zip(layers, jobs, strict=True)).items()
    }
    estimates = (Estimate(*memory[layer], time_s) for layer, time_s in zip(layers, times_s, strict=True))
    based_on = "" if measured is None else f"{measured.num_jobs} measured jobs ({measured.where})"
    return Forecast(tuple(jobs), tuple(estimates), based_on)


def _time(estimates: Sequence[Estimate]) -> tuple[float | None, int]:
    """Return the seconds of all jobs that have a time (None where none has), and the number of jobs without a time."""
    times_s = [estimate.time_s for estimate in estimates if estimate.time_s is not None]
    return (sum(times_s) if times_s else None), len(estimates) - len(times_s)
