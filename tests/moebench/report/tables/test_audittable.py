"""The table of an audit."""

import math
from dataclasses import replace

import pytest
from rich.console import Console

from moebench.report.tables.audittable import AuditTable, cell_words
from moebench.results.record import Status
from tests.moebench.audited import WRONG, audit_of, rows_of


def printed(found):
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        console.print(AuditTable(found))
    return capture.get()


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
    assert (
        "bad:One: one-hot: 2 of 3 cases failed, the first is float32 swiglu bias train: x.grad (token 3): error inf"
        in text
    )
    assert "bad:One: layouts: 1 of 1 cases failed, the first is float64 swiglu bias train: ValueError: no" in text
    assert "loop: cannot run layouts: why" in text
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
