"""Build the audits that a test names."""

from moebench.parity.checks import Search, case_job, search_job
from moebench.parity.space.trial import Trial
from moebench.results.record import Status, record
from moebench.run.audit import Audit, Audited

WRONG = (
    Status.mismatch,
    {"parity_worst": 3.14159, "detail": "x.grad (token 3): error 1, budget 0.3\nmoebench parity a --case 'seed=1'"},
)
SEARCH = Search(2.0, 0, None, ("float32",))


def row_of(job, found):
    """Return the job's record: of a status, or of a pair of status and fields."""
    status, fields = found if isinstance(found, tuple) else (found, {})
    default = {"parity_worst": 0.25} if status is Status.ok else {"detail": "why"}
    return record(job, status, run_id="r", env_id="e", **{**default, **fields})


def audited(backend, *found, searched=(), num_planned=None):
    """Return what was found about a backend: its covering cases in order, and its searches."""
    rows = [row_of(case_job(backend, Trial(num_tokens=8, seed=seed)), one) for seed, one in enumerate(found)]
    rows += [row_of(search_job(backend, SEARCH), one) for one in searched]
    return Audited(backend, tuple(rows), len(found) if num_planned is None else num_planned)


def audit_of(*backends, **fields):
    return Audit(backends, **fields)
