"""The history of a case has its times in the order of the runs, and the change from each time to the next."""

import pytest

from moebench.errors import ResultsError
from moebench.results.history import history, when
from moebench.results.record import Status
from tests.moebench.gated import bad, frame, job_of, ok

CASE = job_of(8)
OTHER = job_of(8, "torch_mm")


def result(day, *times, env_id="e"):
    run = {"run_id": f"202611{day:02}-101500-a", "env_id": env_id, "time_ms_low": None}
    rows = [
        bad(job, Status.oom, run_id=run["run_id"]) if time is None else ok(job, [time], **run, time_ms_high=2 * time)
        for job, time in zip((CASE, OTHER), times, strict=False)
    ]
    return frame(*rows, ok(job_of(16), [9.0]))


@pytest.fixture(scope="module")
def rows():
    results = {
        "third": result(3, 2.0, 8.0, env_id="f"),
        "first": result(1, 1.0),
        "second": result(2, None, 4.0),
        "fourth": result(4, 3.0, 8.0, env_id="f"),
    }
    return history(CASE.case.case_id, results)


def test_results_stand_in_the_order_of_their_runs(rows):
    assert list(rows["result"]) == ["first", "second", "second", "third", "third", "fourth", "fourth"]
    assert list(rows["place"]) == [0, 1, 1, 2, 2, 3, 3]
    assert set(rows["num_tokens"]) == {8}


def test_changes_are_since_the_last_time_there_was_one(rows):
    loop = rows[rows["line"] == "loop"]
    assert loop["change"].tolist() == pytest.approx([float("nan"), float("nan"), 1.0, 0.5], nan_ok=True)
    assert loop["since_first"].tolist() == pytest.approx([0.0, float("nan"), 1.0, 2.0], nan_ok=True)
    other = rows[rows["line"] == "torch_mm"]
    assert other["since_first"].tolist() == [0.0, 1.0, 1.0]


def test_times_of_two_schemas_are_not_divided_by_each_other():
    days = {"first": 1, "second": 1, "third": 2, "fourth": 2}
    results = {
        name: frame(ok(CASE, [time], run_id=f"202611{time:02.0f}-101500-a", schema=schema))
        for (name, schema), time in zip(days.items(), (1.0, 2.0, 3.0, 6.0), strict=True)
    }
    rows = history(CASE.case.case_id, results)
    assert rows["change"].tolist() == pytest.approx([float("nan"), 1.0, float("nan"), 1.0], nan_ok=True)
    assert rows["since_first"].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_a_case_that_no_result_has_is_one_line():
    with pytest.raises(ResultsError, match="none of 1 results has this case"):
        history("nothing", {"a": result(1, 1.0)})


def test_times_of_runs_in_words():
    assert when("20261123-055249-gpu") == "2026-11-23 05:52"
    assert when("my-run") == "my-run"
