"""The table of an audit."""

import math
from dataclasses import replace

from rich.console import Console

from moebench.results.record import Status
from tests.moebench.audited import WRONG, audit_of, rows_of


def printed(found):
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        console.print(found)
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
