"""The comparison has one row per job of any result, with ratios to the first result. Missing values are null."""

import math

import pandas as pd
import pytest

from moebench.errors import ResultsError
from moebench.results.compare import compare, names_of, num_common
from moebench.results.record import Status
from tests.moebench.gated import bad, frame, job_of, ok, waits

SMALL, LARGE, NEW = job_of(8), job_of(64, mode="train"), job_of(8, "torch_mm")


@pytest.fixture(scope="module")
def compared():
    before = frame(
        ok(LARGE, [2.0], tokens_per_s=100.0, saved_memory_bytes=500),
        ok(SMALL, [1.0], tokens_per_s=10.0, parity_worst=0.0),
    )
    after = frame(
        ok(LARGE, [3.0], tokens_per_s=50.0, peak_memory_bytes=150_000_000, saved_memory_bytes=500, parity_worst=0.5),
        bad(SMALL, Status.mismatch),
        ok(NEW, [7.0]),
    )
    return compare({"before": before, "after": after})


def row(compared, job):
    (found,) = compared[(compared["case_id"] == job.case.case_id) & (compared["backend"] == job.backend)].to_dict(
        "records"
    )
    return found


def test_ratios_are_to_the_first(compared):
    large = row(compared, LARGE)
    assert (large["time_ms:before"], large["time_ms:after"], large["time_ms_ratio:after"]) == (2.0, 3.0, 1.5)
    assert large["tokens_per_s_ratio:after"] == 0.5
    assert large["peak_memory_bytes_ratio:after"] == 1.5
    assert large["saved_memory_bytes_ratio:after"] == 1
    assert large["parity_worst_ratio:after"] == 2
    assert "time_ms_ratio:before" not in compared
    assert (large["mode"], large["num_tokens"]) == ("train", 64)


def test_what_one_does_not_have_is_null(compared):
    small = row(compared, SMALL)
    assert (small["status:before"], small["status:after"]) == ("ok", "mismatch")
    assert math.isnan(small["time_ms:after"])
    assert math.isnan(small["time_ms_ratio:after"])
    assert math.isnan(small["parity_worst_ratio:after"]), "over an error of 0 there is no ratio"
    new = row(compared, NEW)
    assert pd.isna(new["status:before"])
    assert new["time_ms:after"] == 7.0


def test_rows_of_different_schemas_have_no_ratio():
    before = frame(ok(LARGE, [2.0], schema=1), ok(SMALL, [2.0]))
    found = compare({"before": before, "after": frame(ok(LARGE, [3.0]), ok(SMALL, [3.0]))})
    large = row(found, LARGE)
    assert (large["time_ms:before"], large["time_ms:after"]) == (2.0, 3.0)
    assert all(math.isnan(large[f"{measure}_ratio:after"]) for measure in ("time_ms", "peak_memory_bytes"))
    assert row(found, SMALL)["time_ms_ratio:after"] == 1.5


def test_rows_are_in_case_order(compared):
    assert [(some["num_tokens"], some["backend"]) for some in compared.to_dict("records")] == [
        (8, "loop"),
        (8, "torch_mm"),
        (64, "loop"),
    ]


def test_a_type_does_not_depend_on_what_is_there(compared):
    failed = frame(bad(SMALL, Status.mismatch), bad(LARGE, Status.crash))
    nothing = compare({"before": failed, "after": failed})
    assert compared.dtypes.to_dict() == nothing.dtypes.to_dict()


def test_results_without_a_job_in_common_with_the_first_are_no_comparison():
    one, two = frame(ok(SMALL, [1.0])), frame(ok(LARGE, [1.0]), ok(NEW, [1.0]))
    for frames in ({"a": one, "b": two}, {"a": one, "b": two, "c": two}, {"a": frame(), "b": frame()}):
        with pytest.raises(ResultsError, match="no job in common"):
            compare(frames)
    both = compare({"a": one, "b": two, "c": one})
    assert num_common({"a": one, "b": two, "c": one}) == {"b": 0, "c": 1}
    assert len(both) == 3


def test_one_result_is_no_comparison():
    with pytest.raises(ResultsError, match="two or more"):
        compare({"before": frame()})


def test_names_are_as_short_as_they_can_be():
    assert names_of(["a/one", "b/two/"]) == ["one", "two"]
    assert names_of(["a/run", "b/run"]) == ["a/run", "b/run"]
    with pytest.raises(ResultsError, match="twice"):
        names_of(["a/run", "a/run"])


def test_the_gpus_own_time_has_a_ratio_where_both_have_it():
    before, after = frame(waits(SMALL, [2.0], [1.0]), ok(LARGE, [2.0])), frame(waits(SMALL, [2.0], [1.5]))
    small = row(compare({"before": before, "after": after}), SMALL)
    assert (small["busy_ms:before"], small["busy_ms:after"], small["busy_ms_ratio:after"]) == (1.0, 1.5, 1.5)
    assert math.isnan(row(compare({"before": before, "after": before}), LARGE)["busy_ms_ratio:after"])
