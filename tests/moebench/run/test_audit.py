"""`moebench parity` from records to a table, and as a user runs it over backends that are right, wrong and broken."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from moebench.errors import UsageError
from moebench.parity.checks import CHECKS, suite_jobs
from moebench.report.tables.audittable import AuditTable, cell_words
from moebench.results.record import Status, record
from moebench.run import audit as audit_module
from moebench.run.audit import Audit, audit
from moebench.run.runner import Outcome

ROOT = Path(__file__).parents[3]


def rows_of(check, backend, *found):
    """Records of a check's first cases, one for each status, or status and fields."""
    jobs = suite_jobs([backend], [check])
    rows = []
    for job, one in zip(jobs, found, strict=False):
        status, fields = one if isinstance(one, tuple) else (one, {})
        fields = {"detail": "why"} | fields if status is not Status.ok else {"parity_worst": 0.25, **fields}
        rows.append(record(job, status, run_id="r", env_id="e", **fields))
    return tuple(rows)


def audit_of(*rows, backends=("loop",), checks=("one-hot",)):
    return Audit(backends, checks, tuple(row for some in rows for row in some))


def printed(found):
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        console.print(AuditTable(found))
    return capture.get()


WRONG = (Status.mismatch, {"parity_worst": 3.14159})
CRASH = Status.crash


@pytest.mark.parametrize(
    ("found", "text", "passed"),
    [
        ((Status.ok, (Status.ok, {"parity_worst": 0.5})), "ok 0.50", True),
        ((Status.ok, Status.unsupported), "ok 0.25", True),
        ((Status.unsupported, Status.unsupported), "unsupported", False),
        ((Status.ok, Status.oom), "ok 0.25", True),
        ((Status.ok, WRONG), "MISMATCH 3.14", False),
        ((CRASH, WRONG), "MISMATCH 3.14", False),
        ((CRASH, Status.ok), "CRASH", False),
        ((Status.timeout,), "TIMEOUT", False),
        ((Status.error, Status.ok), "ERROR", False),
        ((), "not run", False),
        (((Status.ok, {"deterministic": True}), Status.ok), "ok 0.25", True),
        (((Status.ok, {"deterministic": True}), (Status.ok, {"deterministic": False})), "ok 0.25 differs", True),
    ],
)
def test_a_cell_is_the_worst_of_its_cases(found, text, passed):
    whole = audit_of(rows_of("one-hot", "loop", *found))
    assert cell_words(whole.cell("loop", "one-hot")) == text
    assert whole.passed is passed


def test_the_table_says_where_a_backend_is_wrong_and_why_it_cannot():
    infinite = (Status.mismatch, {"parity_worst": math.inf, "detail": "x.grad (token 3): error inf, budget 0.01"})
    text = printed(
        audit_of(
            rows_of("one-hot", "loop", Status.ok),
            rows_of("one-hot", "bad:One", Status.ok, WRONG, infinite),
            rows_of("layouts", "bad:One", (Status.error, {"detail": "ValueError: no\nTraceback\n  there"})),
            rows_of("layouts", "loop", Status.unsupported, Status.unsupported),
            rows_of("fallback", "loop", (Status.ok, {"executed": "aten::mm"})),
            backends=("loop", "bad:One"),
            checks=("one-hot", "layouts"),
        )
    )
    assert "one-hot  ok 0.25      MISMATCH inf" in text
    assert "bad:One: one-hot: 2 of 3 cases: float32 swiglu bias train: x.grad (token 3): error inf" in text
    assert "bad:One: layouts: 1 of 1 cases: float64 swiglu bias train: ValueError: no" in text
    assert "loop: cannot: layouts: why" in text
    assert "loop: executed in float64: aten::mm" in text


def test_who_could_not_run_at_all_is_told():
    whole = audit_of(
        rows_of("one-hot", "loop", Status.ok),
        rows_of("layouts", "loop", Status.unsupported),
        rows_of("one-hot", "te", Status.unsupported, Status.oom),
        backends=("loop", "te"),
        checks=("one-hot", "layouts"),
    )
    assert whole.not_examined == ("te",)
    assert "te: not examined: none of its cases could run" in printed(whole)
    assert whole.as_dict()["not_examined"] == ("te",)
    assert whole.passed
    assert not replace(whole, required=("loop", "te")).passed


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


# as a user types it


def moebench_parity(*arguments, cwd):
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests" / "backends"), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "moebench", "parity", "--device", "cpu", *arguments]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=110)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def test_right_and_wrong_backends_in_worker_processes(tmp_path):
    chosen = ["--check", "masked-tokens", "--check", "one-hot", "--dtype", "float32"]
    found = moebench_parity("loop", "faulty:LeakingMask", *chosen, "--json", cwd=tmp_path)
    told = json.loads(found.out)
    statuses = {(cell["backend"], cell["check"]): cell["status"] for cell in told["checks"]}
    assert found.code == 1
    assert statuses["loop", "masked-tokens"] == statuses["loop", "one-hot"] == "ok"
    assert statuses["faulty:LeakingMask", "masked-tokens"] == "mismatch"
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_backend_is_one_line(tmp_path):
    found = moebench_parity("lop", "--check", "one-hot", cwd=tmp_path)
    assert (found.code, found.out) == (2, "")
    assert "did you mean 'loop'?" in found.err


def test_the_list_names_every_check(tmp_path):
    found = moebench_parity("--list", cwd=tmp_path)
    assert found.code == 0
    assert all(f"\n{name} " in found.out for name in CHECKS)
