"""The table of an audit."""

import math
from dataclasses import replace

import pytest
from rich.console import Console

from moebench.report.tables.audittable import AuditTable, covering_words, search_words
from moebench.results.record import Status
from tests.moebench.audited import WRONG, audit_of, audited


def printed(found, width=120):
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(AuditTable(found), soft_wrap=True)
    return capture.get()


def words(text):
    return [line.split() for line in text.splitlines()]


def test_the_table_says_where_a_backend_is_wrong_and_why_it_cannot():
    infinite = (Status.mismatch, {"parity_worst": math.inf, "detail": "output (token 3): error inf\nthe command"})
    text = printed(
        audit_of(
            audited("loop", Status.ok, (Status.ok, {"parity_worst": 0.5}), Status.unsupported),
            audited("bad:One", Status.ok, infinite, num_planned=7),
            audited("bad:Two", (Status.error, {"detail": "ValueError: no\nTraceback\n  there"})),
        )
    )
    rows = words(text)
    assert ["loop", "ok", "2", "ok,", "1", "not", "applicable", "–", "0.50"] in rows
    assert ["bad:One", "MISMATCH", "1", "ok,", "1", "mismatch,", "5", "not", "run", "–", "0.25"] in rows
    assert ["bad:Two", "ERROR", "1", "error", "–", "–"] in rows
    assert "\nbad:One: output (token 3): error inf\n  the command\n" in text
    assert "\nbad:Two: ValueError: no\n  Traceback\n    there\n" in text
    assert "\nleft out, which is no fault: loop: 1 of 3 cases do not apply: why\n" in text


def test_the_lines_that_a_user_copies_are_not_wrapped():
    command = f"moebench parity bad:One --case '{' '.join(f'field{number}=[red]' for number in range(30))}'"
    lines = ["output: error 1", command, "if True:", f"    x = '{'y' * 300}'"]
    text = printed(audit_of(audited("bad:One", (Status.error, {"detail": "\n".join(lines)}))), width=40)
    assert all(f"  {line}" in text.splitlines() for line in lines[1:])


def test_who_could_not_run_at_all_is_told():
    whole = audit_of(audited("loop", Status.ok), audited("te", Status.unsupported, Status.oom))
    assert whole.not_examined == ("te",)
    assert words(printed(whole))[2][:3] == ["te", "not", "examined"]
    assert "\nte: 1 of 2 cases do not apply: why\nte: 1 of 2 cases do not fit into memory: why\n" in printed(whole)
    assert "no fault" not in printed(whole), "a backend that could not run at all was not examined"
    assert whole.as_dict()["not_examined"] == ("te",)
    assert whole.passed
    assert not replace(whole, required=("loop", "te")).passed


CRASH = Status.crash


@pytest.mark.parametrize(
    ("found", "searched", "result", "passed"),
    [
        ((Status.ok, Status.unsupported), (), "ok", True),
        ((Status.unsupported, Status.unsupported), (), "not examined", False),
        ((Status.ok, Status.oom), (Status.ok,), "ok", True),
        ((Status.ok, WRONG), (), "MISMATCH", False),
        ((Status.ok,), (WRONG,), "MISMATCH", False),
        ((CRASH, WRONG), (), "CRASH", False),
        ((Status.timeout,), (), "TIMEOUT", False),
        ((Status.ok, Status.error), (), "ERROR", False),
        ((), (), "not examined", False),
        (((Status.ok, {"deterministic": True}), Status.ok), (), "ok", True),
        (((Status.ok, {"deterministic": True}), (Status.ok, {"deterministic": False})), (), "ok, bits differ", True),
    ],
)
def test_the_result_is_that_of_the_first_failure(found, searched, result, passed):
    whole = audit_of(audited("loop", *found, searched=searched))
    assert words(printed(whole))[1][1 : 1 + len(result.split())] == result.split()
    assert whole.passed is passed


def test_the_words_for_covering_cases_and_searches():
    one = audited("loop", Status.ok, Status.ok, num_planned=3, searched=[(Status.ok, {"detail": "9 cases"})] * 2)
    assert covering_words(one) == "2 ok, 1 not run"
    assert search_words(one) == "9 cases"
    assert (covering_words(audited("loop")), search_words(audited("loop"))) == ("none", "–")
    assert search_words(audited("loop", searched=[WRONG])) == "failed"
