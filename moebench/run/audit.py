"""Run `moebench parity`: try each backend in worker processes of its own, until a case fails or the time is spent."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moebench.errors import UsageError
from moebench.parity.checks import CHECKS, SEARCH, Search, case_job, covering_jobs, search_job
from moebench.parity.space.rules import misfits
from moebench.parity.space.trial import Trial
from moebench.results.record import GOOD, Record, Status
from moebench.run.plan import Plan, new_run_id
from moebench.run.request import check_device
from moebench.run.runner import execute
from moebench.workload.axes import did_you_mean, listed
from moebench.workload.backends import DISPATCHERS
from moebench.workload.case import DTYPES, Job
from moebench.workload.spec import Policy

Level = Literal["quick", "standard"]

#: A trial that takes longer than this hangs, because trials are small.
TIMEOUT_S = 120.0
#: The wall-clock time of level "standard" for a backend: on one process, and then on two ranks.
STANDARD_S, STANDARD_RANKS_S = 120.0, 60.0
#: A search takes at least this long, also where the covering cases took the whole time.
LEAST_SEARCH_S = 5.0


@dataclass(frozen=True)
class Audited:
    """The records of one backend: its covering cases, and its searches."""

    backend: str
    records: tuple[Record, ...]
    num_planned: int

    @property
    def failure(self) -> Record | None:
        """The first record that failed, or None."""
        return next((row for row in self.records if row.status not in GOOD), None)

    @property
    def covering(self) -> list[Record]:
        """The records of covering cases."""
        return [row for row in self.records if not (row.check or "").startswith(SEARCH)]

    @property
    def searches(self) -> list[Record]:
        """The records of searches."""
        return [row for row in self.records if (row.check or "").startswith(SEARCH)]

    @property
    def could_run(self) -> bool:
        """Whether any case could run."""
        return any(row.status not in (Status.unsupported, Status.oom) for row in self.records)

    @property
    def parity_worst(self) -> float | None:
        """The largest error of the cases that passed, divided by its budget."""
        return max((row.parity_worst for row in self.records if row.status is Status.ok), default=None)  # type: ignore[type-var]

    @property
    def deterministic(self) -> bool | None:
        """Whether repeated calls agreed bit by bit wherever they were compared; None if none were."""
        told = [row.deterministic for row in self.records if row.deterministic is not None]
        return all(told) if told else None

    def as_dict(self) -> dict[str, Any]:
        """Return the backend's results, as values for JSON."""
        failure = self.failure
        return {
            "backend": self.backend,
            "status": failure.status.value if failure else ("ok" if self.could_run else "unsupported"),
            "num_cases": len(self.covering),
            "num_planned": self.num_planned,
            "parity_worst": self.parity_worst,
            "deterministic": self.deterministic,
            "failure": failure and {"case": failure.check, "detail": failure.detail},
            "searches": [row.detail for row in self.searches],
        }


@dataclass(frozen=True)
class Audit:
    """What was found about every backend."""

    backends: tuple[Audited, ...]
    interrupted: bool = False
    required: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no case failed, at least one case could run, and every `required` backend could run a case."""
        idle = set(self.not_examined)
        return (
            len(idle) < len(self.backends)
            and idle.isdisjoint(self.required)
            and not any(one.failure for one in self.backends)
        )

    @property
    def not_examined(self) -> tuple[str, ...]:
        """The backends that could not run any case."""
        return tuple(one.backend for one in self.backends if not one.could_run)

    def as_dict(self) -> dict[str, Any]:
        """Return every backend's results and every record, as values for JSON."""
        return {
            "passed": self.passed,
            "not_examined": self.not_examined,
            "interrupted": self.interrupted,
            "backends": [one.as_dict() for one in self.backends],
            "records": [json.loads(row.to_json()) for one in self.backends for row in one.records],
        }


@dataclass(frozen=True)
class Request:
    """What `moebench parity` was asked. `checks` and `dtypes` are all if they are empty.

    `seconds` is the time of the search, or None for what the covering cases leave of the standard time.
    """

    level: Level = "standard"
    seconds: float | None = None
    checks: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    device: str | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError for a name that does not exist."""
        check_device(self.device)
        _check_names("check", self.checks, CHECKS)
        _check_names("dtype", self.dtypes, DTYPES)


def audit(
    backends: Sequence[str],
    request: Request,
    *,
    required: Sequence[str] = (),
    on_plan: Callable[[str, int], None] = lambda backend, num_jobs: None,
    on_record: Callable[[Record], None] = lambda row: None,
) -> Audit:
    """Try the backends, one after the other.

    The audit passes only if each `required` backend can run. Raises UsageError for a name that does not exist, and the
    errors of moebench.run.runner.execute.
    """
    request.check()
    found: list[Audited] = []
    interrupted = False
    for name in dict.fromkeys(backends):
        own, interrupted = _Auditor(name, request, on_plan, on_record).audit()
        found.append(own)
        if interrupted:
            break
    return Audit(tuple(found), interrupted, tuple(required))


def audit_case(backend: str, trial: Trial, dispatcher: str | None = None, device: str | None = None) -> Audit:
    """Try one case on a backend. Raises UsageError for a case whose values do not fit together."""
    check_device(device)
    for problem in misfits(trial):
        raise UsageError(f"--case '{trial.text}': {problem}")
    if trial.ep_size == 1 and dispatcher is not None:
        raise UsageError(f"--dispatcher {dispatcher} with ep_size = 1: only a case with several ranks has a dispatcher")
    if trial.ep_size > 1:
        _check_names("dispatcher", [dispatcher or DISPATCHERS[0]], DISPATCHERS)
    where = (dispatcher or DISPATCHERS[0]) if trial.ep_size > 1 else "local"
    rows, interrupted = _run([case_job(backend, trial, where)], device, None, lambda row: None)
    return Audit((Audited(backend, tuple(rows), 1),), interrupted, (backend,))


@dataclass
class _Auditor:
    """One backend that is being tried."""

    backend: str
    request: Request
    on_plan: Callable[[str, int], None]
    on_record: Callable[[Record], None]
    num_planned: int = 0

    def audit(self) -> tuple[Audited, bool]:
        """Try the backend on one process, and then on two ranks. Return its records, and whether a signal came."""
        rows: list[Record] = []
        for on_ranks, standard_s in ((False, STANDARD_S), (True, STANDARD_RANKS_S)):
            if on_ranks and (self.request.checks or not any(row.status is Status.ok for row in rows)):
                continue
            found, interrupted = self._part(on_ranks, standard_s)
            rows += found
            if interrupted or any(row.status not in GOOD for row in found):
                return Audited(self.backend, tuple(rows), self.num_planned), interrupted
        return Audited(self.backend, tuple(rows), self.num_planned), False

    def _part(self, on_ranks: bool, standard_s: float) -> tuple[list[Record], bool]:
        request, started = self.request, time.monotonic()
        dtypes = request.dtypes or DTYPES
        checks: Sequence[str | None] = request.checks or (None,)
        jobs = [job for check in checks for job in covering_jobs(self.backend, check, dtypes, request.seed, on_ranks)]
        jobs = list({job.key: job for job in jobs}.values())
        self.num_planned += len(jobs)
        self.on_plan(self.backend, len(jobs))
        rows, interrupted = _run(jobs, request.device, standard_s, self.on_record)
        failed = any(row.status not in GOOD for row in rows)
        searched_s = request.seconds
        if searched_s is None:
            left_s = standard_s - (time.monotonic() - started)
            searched_s = 0.0 if request.level == "quick" else max(LEAST_SEARCH_S, left_s)
        if interrupted or failed or not searched_s or not any(row.status is Status.ok for row in rows):
            return rows, interrupted
        dispatchers = [job.dispatcher for job in jobs if self._ran(rows, job)]
        searches = [(check, where) for check in checks for where in dict.fromkeys(dispatchers)]
        each_s = round(searched_s / len(searches), 1)
        more = [
            search_job(self.backend, Search(each_s, request.seed, check, tuple(dtypes), on_ranks), where)
            for check, where in searches
        ]
        self.on_plan(self.backend, len(more))
        found, interrupted = _run(more, request.device, None, self.on_record)
        return rows + found, interrupted

    @staticmethod
    def _ran(rows: Sequence[Record], job: Job) -> bool:
        return any(row.key == job.key and row.status is Status.ok for row in rows)


class _Failed(Exception):
    """A case has failed, so that no more cases are needed."""


def _run(
    jobs: Sequence[Job], device: str | None, budget_s: float | None, on_record: Callable[[Record], None]
) -> tuple[list[Record], bool]:
    """Run jobs until one fails. Return their records, and whether a signal interrupted them."""
    records: list[Record] = []

    def keep(row: Record) -> None:
        records.append(row)
        on_record(row)
        if row.status not in GOOD:
            raise _Failed

    with tempfile.TemporaryDirectory(prefix="moebench-parity-") as folder:
        plan = Plan(tuple(jobs), Policy(timeout_s=TIMEOUT_S), Path(folder), new_run_id("parity"), device)
        try:
            return records, execute(plan, on_record=keep, time_budget_s=budget_s).interrupted
        except _Failed:
            return records, False


def _check_names(kind: str, names: Sequence[str], valid: Sequence[str] | dict[str, Any]) -> None:
    for name in names:
        if name not in valid:
            hint = did_you_mean(name, valid)
            raise UsageError(f"--{kind} {name}: {hint + ' ' if hint else ''}it must be one of {listed(valid)}")
