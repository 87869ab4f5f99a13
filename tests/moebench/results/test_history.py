"""The history of a case has its times in the order of the runs, and the change from each time to the next."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moebench.errors import ResultsError
from moebench.machine.environment import Environment
from moebench.results.folder import Result
from moebench.results.history import changes, expanded, history, series, when
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


# Changes for good


def found(times, width=0.01):
    times = pd.Series(times, dtype="float64")
    return changes(times, times * (1 - width), times * (1 + width))


def test_a_step_is_a_change_at_its_first_result_and_nowhere_else():
    up = found([1.0, 1.001, 0.999, 1.0, 1.2, 1.201, 1.199, 1.2, 0.9, 0.901, 0.9])
    assert list(up) == [4, 8]
    assert list(up.values()) == pytest.approx([1.2, 0.75], rel=0.01)


def test_one_result_that_is_off_is_no_change_unless_it_is_the_newest():
    assert found([1.0, 1.0, 1.0, 1.5, 1.0, 1.0, 1.0]) == {}
    assert list(found([1.0, 1.0, 1.0, 1.0, 1.5])) == [4]


@pytest.mark.parametrize(
    ("ratio", "width", "number"), [(1.02, 0.001, 0), (1.05, 0.001, 1), (1.2, 0.15, 0), (1.2, 0.05, 1)]
)
def test_small_steps_and_overlapping_intervals_are_none(ratio, width, number):
    assert len(found([1.0] * 4 + [ratio] * 4, width)) == number


def test_noise_alone_is_rarely_a_change_and_a_step_beyond_it_mostly_is():
    """200 series of 30 results each, with noise of 1, 3 and 10%, without and with a step of five times the noise."""
    draw = np.random.default_rng(7)
    for noise in (0.01, 0.03, 0.1):
        quiet = [np.exp(draw.normal(0, noise, 30)) for _ in range(200)]
        assert sum(bool(found(times[:-1], noise)) for times in quiet) < 10
        stepped = [times * np.where(np.arange(30) < 15, 1, np.exp(5 * noise)) for times in quiet]
        assert sum(any(abs(at - 15) <= 1 for at in found(times, noise)) for times in stepped) > 150


def test_the_series_has_revisions_by_result_and_changes_by_job():
    """Two results may have one environment, which has another revision in each."""
    environment = Environment.from_file(Path("results/published/h200-2026-11-23/environment.json"))
    results = {}
    for day, time in enumerate((1.0, 1.0, 1.0, 2.0, 2.0), 1):
        of_day = environment.model_copy(update={"git_revision": f"{day}" * 40, "env_id": "e"})
        run = {"run_id": f"202611{day:02}-101500-a", "env_id": "e"}
        rows = frame(ok(CASE, [time], time_ms_low=time, time_ms_high=time, **run), ok(OTHER, [3.0], **run))
        results[f"day {day}"] = Result(rows, {"e": of_day})
    rows = series(results)
    assert list(dict.fromkeys(rows["revision"])) == [f"{day}" * 40 for day in range(1, 6)]
    (change,) = rows[rows["is_change"]].to_dict("records")
    assert (change["result"], change["line"], change["ratio"]) == ("day 4", "loop", pytest.approx(2.0))
    assert change["is_confirmed"]
    newest = series({name: results[name] for name in list(results)[:4]})
    assert list(newest.loc[newest["is_change"], "is_confirmed"]) == [False]


def test_a_folder_of_results_stands_for_the_results_in_it(tmp_path):
    for name in ("b", "a", "empty"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / name / "results.parquet").touch()
    assert expanded([tmp_path]) == [tmp_path / "a", tmp_path / "b"]
    assert expanded([tmp_path / "b", tmp_path / "a" / "results.parquet", tmp_path / "empty"]) == [
        tmp_path / "b",
        tmp_path / "a" / "results.parquet",
        tmp_path / "empty",
    ]


def test_a_result_that_happens_to_lie_below_those_before_it_is_not_where_the_change_is():
    """The fourth time is a little below the first three. The change by a fifth comes after it."""
    times = [1.0, 1.001, 1.002, 0.998, 0.8, 0.801, 0.8]
    assert list(found(times, 0.0001)) == [4]
