"""Build the audits that a test names."""

from moebench.parity.checks import suite_jobs
from moebench.results.record import Status, record
from moebench.run.audit import Audit

WRONG = (Status.mismatch, {"parity_worst": 3.14159})


def rows_of(check, backend, *found):
    """Return records of a check's first cases: one per status, or per pair of status and fields."""
    jobs = suite_jobs([backend], [check])
    rows = []
    for job, one in zip(jobs, found, strict=False):
        status, fields = one if isinstance(one, tuple) else (one, {})
        fields = {"detail": "why"} | fields if status is not Status.ok else {"parity_worst": 0.25, **fields}
        rows.append(record(job, status, run_id="r", env_id="e", **fields))
    return tuple(rows)


def audit_of(*rows, backends=("loop",), checks=("one-hot",)):
    return Audit(backends, checks, tuple(row for some in rows for row in some))
