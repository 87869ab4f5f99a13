"""What a gate writes for machines: JUnit that parses, annotations that stay one line, JSON without infinity."""

import json
import re
from xml.etree import ElementTree as xml

import pytest
from rich.console import Console

from moebench import gatejson, github, junit
from moebench.gatetable import GateTable
from moebench.record import Status
from tests.moebench.gated import bad, gated, job_of, ok, steady

JOBS = {
    name: job_of(tokens) for name, tokens in {"same": 1, "slow": 2, "gone": 3, "one": 4, "crash": 5, "new": 6}.items()
}
NASTY = "died \x1b[31m100%\x00 <b>|`x`, a:b\x07\nand more"


@pytest.fixture(scope="module")
def result():
    """One of each: PASS, REGRESSED by time, MISSING, INCONCLUSIVE, REGRESSED by a crash with a nasty reason, NEW."""
    slow = steady(time_ms=1.0512)
    before = [ok(JOBS[name], steady()) for name in ("same", "slow", "gone", "crash")]
    after = [ok(JOBS["same"], steady()), ok(JOBS["slow"], slow, peak_memory_bytes=1_250_000), ok(JOBS["new"], slow)]
    return gated(
        [*before, ok(JOBS["one"], [1.0])],
        [*after, ok(JOBS["one"], [1.0]), bad(JOBS["crash"], Status.crash, NASTY)],
    )


def cases(result):
    return {(case.get("name"), case.get("classname")): case for case in parsed(result).iter("testcase")}


def parsed(result):
    return xml.fromstring(junit.document(result))


def test_junit_counts_what_it_holds(result):
    root = parsed(result)
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    for element in (root, suite):
        assert int(element.get("tests")) == len(list(suite.iter("testcase"))) == 12
        assert int(element.get("failures")) == len(list(suite.iter("failure"))) == 4
        assert int(element.get("skipped")) == len(list(suite.iter("skipped"))) == 2
    names = [(case.get("name"), case.get("classname")) for case in suite.iter("testcase")]
    assert len(set(names)) == len(names)


def test_junit_fails_what_the_gate_fails(result):
    found = cases(result)
    slow = found[JOBS["slow"].case.case_id, "loop.time"]
    assert slow.find("failure").get("message").startswith("REGRESSED: slower")
    assert {some.get("name"): some.get("value") for some in slow.iter("property")}["ratio"] == "1.051"
    assert found[JOBS["slow"].case.case_id, "loop.memory"].find("failure") is not None
    assert found[JOBS["slow"].case.case_id, "loop.parity"].find("failure") is None
    assert found[JOBS["gone"].case.case_id, "loop.job"].find("failure").get("type") == "MISSING"
    assert found[JOBS["one"].case.case_id, "loop.time"].find("skipped").get("message").startswith("INCONCLUSIVE")
    assert found[JOBS["same"].case.case_id, "loop.time"].find("skipped") is None


def test_junit_survives_any_reason(result):
    failure = cases(result)[JOBS["crash"].case.case_id, "loop.parity"].find("failure")
    assert failure.get("message") == "REGRESSED: crash: died \ufffd[31m100%\ufffd <b>|`x`, a:b\ufffd"


ANNOTATION = re.compile(r"::(error|warning) title=([^:,\n\r]*)::([^\n\r]*)")


def test_annotations_are_workflow_commands(result):
    found = [ANNOTATION.fullmatch(line).groups() for line in github.annotations(result)]
    assert [level for level, _, _ in found] == ["error"] * 3 + ["warning"]
    titles = [title.replace("%3A", ":") for _, title, _ in found]
    assert titles == ["moebench: REGRESSED"] * 2 + ["moebench: MISSING", "moebench: INCONCLUSIVE"]
    messages = "\n".join(message for _, _, message in found)
    assert "+5.1%25 (" in messages
    assert "died \x1b[31m100%25" in messages
    assert not re.search("%(?!25|0A|0D)", messages)


def test_no_more_annotations_than_github_shows():
    jobs = [job_of(number) for number in range(1, 31)]
    many = gated([ok(job, steady(20)) for job in jobs], [ok(job, steady(20, 2.0)) for job in jobs])
    lines = github.annotations(many)
    assert len(lines) == 10
    assert "and 21 more" in lines[-1]
    nothing = gated([ok(jobs[0], steady())], [ok(jobs[0], steady())])
    assert github.annotations(nothing) == []


def test_the_step_summary_is_a_table_that_nothing_breaks(result):
    text = github.summary(result)
    assert text.startswith("## moebench gate: 2 REGRESSED, 1 MISSING, 1 INCONCLUSIVE, 1 NEW, 1 PASS\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert columns == {9}
    assert len(rows) == 6 + 2 * 2
    assert "<b>" not in text
    assert "earlier against later rounds" in text


def test_json_has_every_number_and_no_infinity(result):
    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(json.dumps(gatejson.document(result)), parse_constant=refuse)
    assert found["exit_code"] == 1
    assert found["counts"] == {"REGRESSED": 2, "MISSING": 1, "INCONCLUSIVE": 1, "NEW": 1, "PASS": 1}
    jobs = {job["case_id"]: job for job in found["jobs"]}
    slow = jobs[JOBS["slow"].case.case_id]
    assert slow["verdict"] == "REGRESSED"
    assert slow["time"]["ratio"] == pytest.approx(1.0512, rel=1e-3)
    assert slow["time"]["rounds"] == [10, 10]
    assert slow["peak_memory_bytes"] == {"baseline": 1_000_000, "candidate": 1_250_000}
    assert {some["measure"]: some["verdict"] for some in slow["findings"]}["memory"] == "REGRESSED"
    one = jobs[JOBS["one"].case.case_id]["time"]
    assert (one["smallest_effect"], one["low"], one["high"]) == (None, None, None)
    assert jobs[JOBS["gone"].case.case_id]["status"] == {"baseline": "ok", "candidate": None}
    assert jobs[JOBS["crash"].case.case_id]["status"]["candidate"] == "crash"
    baseline, candidate = found["self_comparisons"]
    assert baseline["num_compared"] == 4
    assert (candidate["num_alarms"], candidate["false_alarm_rate"]) == (0, 0)


def printed(result, width=100):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(GateTable(result))
    return capture.get()


def test_the_table_has_the_worst_first_and_says_why(result):
    lines = printed(result, 160).splitlines()
    verdicts = [line.split()[0] for line in lines if line.startswith(("REGR", "MISS", "INCON", "NEW", "PASS"))]
    assert verdicts[:6] == ["REGRESSED", "REGRESSED", "MISSING", "INCONCLUSIVE", "NEW", "PASS"]
    slow = next(line for line in lines if "+5.1%" in line)
    assert "+25.00%" in slow
    assert "0.25" in slow
    text = "\n".join(lines)
    assert f"REGRESSED time: slower: loop on {JOBS['slow'].case.case_id}" in text
    assert "measure with --rounds" in text
    assert lines[-1] == "gate: 2 REGRESSED, 1 MISSING, 1 INCONCLUSIVE, 1 NEW, 1 PASS"


def test_the_table_shows_what_could_have_been_seen(result):
    text = printed(result, 160)
    smallest = next(job.time.smallest_effect for job in result.jobs if job.key[0] == JOBS["same"].case.case_id)
    (row,) = (line for line in text.splitlines() if line.startswith("PASS"))
    assert f"{smallest:.1%}" in row


def test_the_table_says_what_was_measured_where(result):
    assert printed(result).splitlines()[1] == "NVIDIA H200, L2 cold, 2026-11-23"
    assert "e8k2d256i512, bfloat16, forward, uniform routing" in printed(result).splitlines()[0]


def test_80_columns_are_enough(result):
    assert max(map(len, printed(result, 80).splitlines())) <= 80
