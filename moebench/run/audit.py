"""Run the checks of `moebench parity`, each backend in its own worker processes."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.parity.checks import CHECKS, suite_jobs
from moebench.results.frame import jsonable
from moebench.results.record import GOOD, Record, Status
from moebench.run.plan import Plan, new_run_id
from moebench.run.request import check_device
from moebench.run.runner import execute
from moebench.workload.axes import did_you_mean, listed
from moebench.workload.case import DTYPES, Job
from moebench.workload.spec import Policy

#: A worker that takes longer than this for one job hangs, because the jobs of checks are small.
TIMEOUT_S = 120.0
#: After this many crashes or timeouts of one backend, the audit stops checking it.
MOST_DEATHS = 3
_WORST_CASE_FIRST = (
    Status.mismatch,
    Status.error,
    Status.crash,
    Status.timeout,
    Status.ok,
    Status.oom,
    Status.unsupported,
)


@dataclass(frozen=True)
class AuditCell:
    """The records of one backend's cases in one check."""

    backend: str
    check: str
    records: tuple[Record, ...]

    @property
    def status(self) -> Status | None:
        """The worst status of the cell's cases; None if the cell has no cases.

        Cases with the status oom or unsupported count only if the cell has no other cases.
        """
        return min((row.status for row in self.records), key=_WORST_CASE_FIRST.index, default=None)

    @property
    def failures(self) -> list[Record]:
        """The records that failed, worst first."""
        failed = [row for row in self.records if row.status not in GOOD]
        return sorted(failed, key=lambda row: (_WORST_CASE_FIRST.index(row.status), -(row.parity_worst or 0.0)))

    @property
    def parity_worst(self) -> float | None:
        """The largest error, divided by its budget."""
        return max((row.parity_worst for row in self.records if row.parity_worst is not None), default=None)

    @property
    def deterministic(self) -> bool | None:
        """Whether repeated runs agreed bit by bit wherever they were compared; None if no runs were compared."""
        told = [row.deterministic for row in self.records if row.deterministic is not None]
        return all(told) if told else None


@dataclass(frozen=True)
class Audit:
    """What the checks found in every backend."""

    backends: tuple[str, ...]
    checks: tuple[str, ...]
    records: tuple[Record, ...]
    interrupted: bool = False
    required: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no case failed, at least one case could run, and every `required` backend could run a case.

        A case that is unsupported or did not fit into memory is not a failure.
        """
        missing = self.not_examined == self.backends or not set(self.required).isdisjoint(self.not_examined)
        return not missing and all(row.status in GOOD for row in self.records)

    @property
    def not_examined(self) -> tuple[str, ...]:
        """The backends that could not run any case."""
        could_run = {row.backend for row in self.records if row.status not in (Status.unsupported, Status.oom)}
        return tuple(backend for backend in self.backends if backend not in could_run)

    def cell(self, backend: str, check: str) -> AuditCell:
        """Return the cell of one backend and one check."""
        rows = tuple(row for row in self.records if (row.backend, row.check) == (backend, check))
        return AuditCell(backend, check, rows)

    @property
    def cells(self) -> list[AuditCell]:
        """All cells, check by check."""
        return [self.cell(backend, check) for check in self.checks for backend in self.backends]

    def as_dict(self) -> dict[str, Any]:
        """Return every cell and every record, as values for JSON."""
        return {
            "passed": self.passed,
            "not_examined": self.not_examined,
            "interrupted": self.interrupted,
            "checks": [
                {
                    "check": cell.check,
                    "looks_for": CHECKS[cell.check].looks_for,
                    "backend": cell.backend,
                    "status": cell.status and cell.status.value,
                    "num_cases": len(cell.records),
                    "num_failures": len(cell.failures),
                    "parity_worst": None if cell.parity_worst is None else jsonable(cell.parity_worst),
                    "deterministic": cell.deterministic,
                    "detail": cell.failures[0].detail if cell.failures else None,
                }
                for cell in self.cells
            ],
            "records": [json.loads(row.to_json()) for row in self.records],
        }


def audit(
    backends: Sequence[str],
    *,
    checks: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    device: str | None = None,
    seed: int = 0,
    required: Sequence[str] = (),
    on_plan: Callable[[int], None] = lambda num_jobs: None,
    on_record: Callable[[Record], None] = lambda row: None,
) -> Audit:
    """Run the checks (default all) in the dtypes (default all) on the backends.

    The audit passes only if each `required` backend can run. Raises UsageError for an unknown check, dtype or device,
    and the errors of moebench.run.runner.execute.
    """
    check_device(device)
    _check_names("check", checks, CHECKS)
    _check_names("dtype", dtypes, DTYPES)
    wanted = tuple(name for name in CHECKS if not checks or name in checks)
    jobs = {name: suite_jobs([name], wanted, dtypes or DTYPES, seed) for name in dict.fromkeys(backends)}
    on_plan(sum(map(len, jobs.values())))
    records: list[Record] = []
    interrupted = False
    for own in jobs.values():
        found, interrupted = _examine(own, device, on_record)
        records += found
        if interrupted:
            break
    return Audit(tuple(jobs), wanted, tuple(records), interrupted, tuple(required))


class _Enough(Exception):
    """A backend has had MOST_DEATHS crashes or timeouts."""


def _examine(jobs: Sequence[Job], device: str | None, on_record: Callable[[Record], None]) -> tuple[list[Record], bool]:
    records: list[Record] = []

    def keep(row: Record) -> None:
        records.append(row)
        on_record(row)
        if sum(one.status in (Status.crash, Status.timeout) for one in records) >= MOST_DEATHS:
            raise _Enough

    with tempfile.TemporaryDirectory(prefix="moebench-parity-") as folder:
        plan = Plan(tuple(jobs), Policy(timeout_s=TIMEOUT_S), Path(folder), new_run_id("parity"), device)
        try:
            return records, execute(plan, on_record=keep).interrupted
        except _Enough:
            return records, False


def _check_names(kind: str, names: Sequence[str], valid: Sequence[str] | dict[str, Any]) -> None:
    for name in names:
        if name not in valid:
            hint = did_you_mean(name, valid)
            raise UsageError(f"--{kind} {name}: {hint + ' ' if hint else ''}it must be one of {listed(valid)}")
