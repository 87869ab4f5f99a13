"""An audit: what it runs, what it refuses, and when it ends."""

import json
import math

import pytest

from moebench.errors import UsageError
from moebench.parity.checks import suite_jobs
from moebench.results.record import Status, record
from moebench.run import audit as audit_module
from moebench.run.audit import audit
from moebench.run.runner import Outcome
from tests.moebench.audited import audit_of, rows_of


def test_json_has_every_cell_and_every_record():
    whole = audit_of(rows_of("one-hot", "loop", Status.ok, (Status.mismatch, {"parity_worst": math.inf})))
    told = json.loads(json.dumps(whole.as_dict(), allow_nan=False))
    (cell,) = told["checks"]
    assert not told["passed"]
    assert (cell["check"], cell["backend"], cell["status"], cell["num_cases"], cell["num_failures"]) == (
        ("one-hot", "loop", "mismatch", 2, 1)
    )
    assert cell["parity_worst"] == "inf"
    assert len(told["records"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checks": ["layout"]}, 'check layout: did you mean "layouts"?'),
        ({"dtypes": ["float8"]}, "dtype float8: .*must be one of float64, float32, bfloat16, float16"),
        ({"device": "tpu"}, "device tpu"),
    ],
)
def test_what_there_is_not_is_refused_before_anything_runs(arguments, message, monkeypatch):
    monkeypatch.setattr(audit_module, "execute", lambda *plans, **options: pytest.fail("it ran"))
    with pytest.raises(UsageError, match=message):
        audit(["loop"], **arguments)


def test_a_backend_that_goes_on_dying_is_left_and_the_next_is_examined(monkeypatch):
    def execute(plan, on_record):
        status = Status.crash if plan.jobs[0].backend == "dies" else Status.ok
        rows = [
            record(job, status, run_id="r", env_id="e", **({"detail": "died"} if status else {}), parity_worst=0.1)
            for job in plan.jobs
        ]
        for row in rows:
            on_record(row)
        return Outcome(tuple(rows), 0)

    monkeypatch.setattr(audit_module, "execute", execute)
    num_jobs = []
    found = audit(["dies", "lives"], checks=["one-hot"], on_plan=num_jobs.append)
    assert num_jobs == [2 * len(suite_jobs(["a"], ["one-hot"]))]
    by_backend = {name: [row.status for row in found.records if row.backend == name] for name in found.backends}
    assert by_backend == {"dies": [Status.crash] * 3, "lives": [Status.ok] * 8}


def test_an_interruption_ends_the_whole(monkeypatch):
    monkeypatch.setattr(audit_module, "execute", lambda plan, on_record: Outcome((), len(plan.jobs), True))
    found = audit(["loop", "torch_mm"])
    assert found.interrupted
    assert found.records == ()
