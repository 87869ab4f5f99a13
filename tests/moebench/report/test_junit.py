"""The JUnit XML parses whatever the reasons contain, and fails what the gate fails."""

from xml.etree import ElementTree as xml

import pytest

from moebench.report import junit
from tests.moebench.gated import JOBS, gated, job_of, one_of_each, steady, waits


@pytest.fixture(scope="module")
def result():
    return one_of_each()


def cases(result):
    return {(case.get("name"), case.get("classname")): case for case in parsed(result).iter("testcase")}


def parsed(result):
    return xml.fromstring(junit.junit_xml(result))


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


def test_the_gpus_own_time_is_a_test_case_of_its_own():
    result = gated(
        [waits(job_of(), steady(), steady())], [waits(job_of(), steady(seed=1), steady(time_ms=1.05, seed=2))]
    )
    found = {case.get("classname"): case for case in parsed(result).iter("testcase")}
    assert [name for name, case in found.items() if case.find("failure") is not None] == ["loop.busy"]
    assert {some.get("name"): some.get("value") for some in found["loop.busy"].iter("property")}["ratio"] == "1.05"
    assert {some.get("name"): some.get("value") for some in found["loop.time"].iter("property")}["ratio"] == "1"
