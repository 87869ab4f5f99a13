"""The status of a record decides which fields it must have and which it may not have."""

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from moebench.results.record import GOOD, ONLY_IF_OK, SCHEMA, Record, Status, record
from moebench.workload.case import Case, Job

CASE = Case(
    num_tokens=8,
    n_routed_experts=4,
    n_activated_experts=2,
    dim=16,
    moe_inter_dim=32,
    dtype="float32",
    routing="zipf:1.5",
    expert_bias=True,
    masked_share=0.25,
)
SAMPLES = {"samples_ms": (1.0,), "sample_rounds": (0,), "sample_sessions": (0,), "sample_marked": (False,)}
VALUES = {"l2": "cold", **SAMPLES, "busy_samples_ms": (1.0,), "busy_sample_rounds": (0,)}
VALUES |= {"expert_rows": (1,), "rank_rows": (1,)}


def ok(backend: str = "loop", **measured: Any) -> Record:
    measured = {"time_ms": 1.5, "parity_worst": 0.25, **measured}
    return record(Job(case=CASE, backend=backend), Status.ok, run_id="r", env_id="e", **measured)


def bad(status: Status, **measured: Any) -> Record:
    measured = {"detail": "why", "parity_worst": 3.0, **measured}
    return record(Job(case=CASE, backend="loop"), status, run_id="r", env_id="e", **measured)


def test_record_holds_every_field_of_its_job() -> None:
    row = record(Job(case=CASE, backend="m:A", dispatcher="alltoall"), Status.oom, run_id="r", env_id="e", detail="d")
    assert Case(**{name: getattr(row, name) for name in Case.model_fields}) == CASE
    assert (row.backend, row.dispatcher, row.case_id) == ("m:A", "alltoall", CASE.case_id)


def test_record_has_a_column_for_every_field_of_a_case() -> None:
    assert Case.model_fields.keys() <= Record.model_fields.keys()


def test_what_was_not_measured_is_null() -> None:
    row = json.loads(ok().to_json())
    assert [name for name in ("backward_ms", "tflops", "peak_memory_bytes", "converged") if row[name] is not None] == []
    assert row["schema"] == SCHEMA


@pytest.mark.parametrize("missing", [{"time_ms": None}, {"parity_worst": None}])
def test_ok_needs_a_time_and_a_parity_error(missing: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="status ok needs a"):
        ok(**missing)


def test_ok_of_a_check_needs_no_time_but_a_parity_error() -> None:
    job = Job(case=CASE, backend="loop", check="layouts")
    row = record(job, Status.ok, run_id="r", env_id="e", parity_worst=0.25)
    assert (row.time_ms, row.check, row.key) == (None, "layouts", job.key)
    with pytest.raises(ValidationError, match="needs a parity error"):
        record(job, Status.ok, run_id="r", env_id="e")


@pytest.mark.parametrize("worst", [1.0001, math.inf, math.nan])
def test_ok_needs_an_error_within_its_budget(worst: float) -> None:
    with pytest.raises(ValidationError, match="within its budget"):
        ok(parity_worst=worst)


def test_ok_may_use_its_whole_budget() -> None:
    assert ok(parity_worst=1.0).status is Status.ok


@pytest.mark.parametrize("time_ms", [0.0, -1.0, math.nan, math.inf, 5e-324, 1e308])
def test_a_time_lies_between_a_femtosecond_and_31_years(time_ms: float) -> None:
    with pytest.raises(ValidationError, match="time_ms"):
        ok(time_ms=time_ms)
    with pytest.raises(ValidationError, match="samples_ms"):
        ok(samples_ms=(1.5, time_ms))
    with pytest.raises(ValidationError, match="busy_ms"):
        ok(busy_ms=time_ms)
    with pytest.raises(ValidationError, match="busy_samples_ms"):
        ok(busy_samples_ms=(1.5, time_ms))


@pytest.mark.parametrize(
    "ends",
    [{"time_ms_low": 1.6}, {"time_ms_high": 1.4}, {"time_ms_low": math.nan}, {"time_ms_high": math.nan}],
)
def test_a_time_lies_in_its_interval(ends: dict[str, float]) -> None:
    assert ok(time_ms_low=-math.inf, time_ms_high=math.inf).time_ms == 1.5
    with pytest.raises(ValidationError, match="time_ms_"):
        ok(**ends)
    busy = {name.replace("time", "busy"): end for name, end in ends.items()}
    with pytest.raises(ValidationError, match="busy_ms_"):
        ok(busy_ms=1.5, **busy)


def test_every_sample_has_its_round_and_its_mark() -> None:
    assert ok(samples_ms=(1.0, 2.0), sample_rounds=(0, 1)).sample_marked is None
    for name, entries in {"sample_rounds": (0,), "sample_marked": (True,)}.items():
        with pytest.raises(ValidationError, match="one entry for each sample"):
            ok(samples_ms=(1.0, 2.0), **{name: entries})


def test_every_sample_of_the_gpus_own_time_has_a_round_of_the_row() -> None:
    found = ok(
        samples_ms=(1.0, 2.0), sample_rounds=(3, 5), busy_ms=9.0, busy_samples_ms=(9.0,), busy_sample_rounds=(5,)
    )
    assert found.busy_ms == 9.0, "longer than the time: another call was profiled"
    assert ok(busy_ms=1.0, busy_samples_ms=(1.0,)).busy_sample_rounds is None
    with pytest.raises(ValidationError, match="busy_samples_ms and busy_sample_rounds must have one entry"):
        ok(busy_samples_ms=(1.0, 2.0), busy_sample_rounds=(0,))
    with pytest.raises(ValidationError, match="busy_sample_rounds has the round 4, which sample_rounds does not"):
        ok(samples_ms=(1.0,), sample_rounds=(3,), busy_samples_ms=(1.0,), busy_sample_rounds=(4,))


@pytest.mark.parametrize("name", ["case_id", "env_id", "run_id"])
@pytest.mark.parametrize("value", ["", "/etc/x", "../../x", "a/b", "a\0", ".hidden", "-option", "a\n", "é", "a b", "."])
def test_a_name_that_becomes_a_path_is_one_part_of_a_path(name: str, value: str) -> None:
    fields = json.loads(ok().to_json())
    with pytest.raises(ValidationError, match=name):
        Record.model_validate({**fields, name: value})


def test_a_row_of_several_rounds_has_the_names_of_all() -> None:
    fields = json.loads(ok().to_json())
    several = Record.model_validate({**fields, "env_id": "a1 | b2", "run_id": "20261123-000000-a | 20261124-000000-b"})
    assert several.env_id == "a1 | b2"


def test_numbers_fit_into_the_columns_of_a_file() -> None:
    for name in ("peak_memory_bytes", "num_samples", "num_rounds", "round"):
        with pytest.raises(ValidationError, match=name):
            ok(**{name: 2**63})


def test_a_row_is_a_case_that_may_exist() -> None:
    fields = json.loads(ok().to_json())
    with pytest.raises(ValidationError, match="exceeds n_routed_experts"):
        Record.model_validate({**fields, "n_activated_experts": 5})


@pytest.mark.parametrize("name", ONLY_IF_OK)
@pytest.mark.parametrize("status", [status for status in Status if status is not Status.ok])
def test_only_ok_carries_a_speed_and_memory(status: Status, name: str) -> None:
    with pytest.raises(ValidationError, match=f"must have no speed and no memory, but has .*{name}"):
        bad(status, **{name: VALUES.get(name, 1)})


@pytest.mark.parametrize("detail", [None, ""])
@pytest.mark.parametrize("status", [status for status in Status if status is not Status.ok])
def test_other_statuses_say_why(status: Status, detail: str | None) -> None:
    assert bad(status).detail == "why"
    with pytest.raises(ValidationError, match="needs a reason in detail"):
        bad(status, detail=detail)


def test_mismatch_carries_its_error() -> None:
    with pytest.raises(ValidationError, match="needs its parity_worst"):
        bad(Status.mismatch, parity_worst=None)


def test_good_statuses_are_results_about_a_backend() -> None:
    assert {"ok", "unsupported", "oom"} == GOOD


def test_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="time_s"):
        ok(time_s=1.0)
