"""The forecast of a sweep: a job's time is that of the nearest measured job, or is unknown without a near one."""

from pathlib import Path
from typing import Any

import pytest

from moebench.results.bulk.tables import table_of
from moebench.results.frame import to_frame, write
from moebench.results.record import Record, Status
from moebench.run.forecast import KnownTimes, forecast, measured_jobs
from moebench.run.memory.footprint import footprint
from moebench.workload.case import Job
from moebench.workload.spec import available_sweeps, load_sweep
from tests.moebench.drawn import bad, case, ok

RESULTS = (Path(__file__).parents[3] / "results" / "published").glob("*/results.parquet")
PUBLISHED = sorted(path.parent for path in RESULTS)


def took(job_s: float, backend: str = "te", dispatcher: str = "local", **fields: Any) -> Record:
    return ok(case(**{"num_tokens": 1024, **fields}), backend, dispatcher=dispatcher, job_s=job_s)


def asked(backend: str = "te", dispatcher: str = "local", **fields: Any) -> Job:
    return Job(case=case(**{"num_tokens": 1024, **fields}), backend=backend, dispatcher=dispatcher)


def of(*rows: Record) -> KnownTimes:
    return KnownTimes(table_of(rows))


def test_a_job_takes_as_long_as_the_nearest_one() -> None:
    measured = of(took(1.0, num_tokens=128), took(2.0), took(3.0, num_tokens=4096), took(4.0, moe_inter_dim=2048))
    assert measured.time_s(asked()) == 2.0
    assert measured.time_s(asked(num_tokens=256)) == 1.0
    assert measured.time_s(asked(num_tokens=16384)) == 3.0
    assert measured.time_s(asked(moe_inter_dim=4096)) == 4.0
    assert measured.time_s(asked(routing="zipf", seed=3)) == 2.0


def test_ranks_are_near_if_they_hold_as_much() -> None:
    """Eight ranks with 64 experts hold 8 each, as two ranks with 16 do. One rank with all 64 is less similar."""
    measured = of(took(1.0, n_routed_experts=64), took(2.0, "te", "deepep", n_routed_experts=16, ep_size=2))
    assert measured.time_s(asked(dispatcher="deepep", n_routed_experts=64, ep_size=8)) == 2.0


def test_the_own_dispatcher_is_nearer_than_another() -> None:
    rows = [took(1.0, dispatcher="allgather", ep_size=2), took(2.0, dispatcher="alltoall", ep_size=2)]
    assert [of(*rows).time_s(asked(dispatcher=way, ep_size=4)) for way in ("allgather", "alltoall")] == [1.0, 2.0]
    further = took(3.0, dispatcher="deepep", ep_size=2, num_tokens=128)
    assert of(*rows, further).time_s(asked(dispatcher="deepep", ep_size=2)) in (1.0, 2.0)


@pytest.mark.parametrize(
    "other",
    [
        {"backend": "gmm"},
        {"mode": "train"},
        {"dtype": "float32"},
        {"num_tokens": 1024 * 17},
        {"num_tokens": 1024 // 17},
        {"dim": 256 * 9},
        {"ep_size": 8, "n_routed_experts": 64, "dispatcher": "deepep"},
    ],
    ids=str,
)
def test_without_a_near_job_there_is_no_time(other: dict[str, Any]) -> None:
    measured = of(took(1.0))
    assert measured.time_s(asked(**other)) is None
    assert forecast([asked(**other)], measured).time_s is None


def test_a_context_takes_as_long_as_the_context_or_else_as_plain() -> None:
    plain, checkpoint = took(1.0, mode="train"), took(2.0, mode="train", context="checkpoint")
    assert of(plain, checkpoint).time_s(asked(mode="train", context="checkpoint")) == 2.0
    assert of(plain, checkpoint).time_s(asked(mode="train")) == 1.0
    assert of(plain, checkpoint).time_s(asked(mode="train", context="offload")) == 1.0
    assert of(checkpoint).time_s(asked(mode="train")) is None


def test_a_block_takes_as_long_as_blocks_only() -> None:
    experts, block = took(1.0), took(2.0, subject="block:olmoe")
    assert of(experts, block).time_s(asked(subject="block:olmoe")) == 2.0
    assert of(experts, block).time_s(asked()) == 1.0
    assert of(experts).time_s(asked(subject="block:olmoe")) is None


def test_a_job_of_several_rounds_tells_the_time_of_one() -> None:
    assert of(took(9.0).model_copy(update={"num_rounds": 3})).time_s(asked()) == 3.0


def test_what_failed_tells_no_time() -> None:
    measured = of(bad(case(1024), Status.timeout, "te", job_s=300.0), took(1.0, num_tokens=2048))
    assert (measured.num_jobs, measured.time_s(asked())) == (1, 1.0)


def test_a_sweep_takes_the_sum_of_its_jobs_and_the_memory_of_the_largest() -> None:
    jobs = [asked(), asked(num_tokens=16), asked(num_tokens=2048), asked("loop"), asked(ep_size=2, dispatcher="deepep")]
    found = forecast(jobs, of(took(1.5)))
    assert (found.time_s, found.num_untimed) == (4.5, 2)
    assert found.memory_bytes == max(footprint(job).peak_bytes for job in jobs)
    told = found.as_dict()
    assert [(line["ep_size"], line["backend"], line["num_jobs"], line["time_s"]) for line in told["lines"]] == [
        (1, "te", 3, 3.0),
        (1, "loop", 1, None),
        (2, "te", 1, 1.5),
    ]
    assert told["lines"][0]["num_untimed"] == 1
    assert "NVIDIA H200" in told["based_on"]


def test_measured_jobs_are_those_of_results_folders(tmp_path: Path) -> None:
    write(to_frame([took(1.0), took(2.0, num_tokens=16)]), tmp_path)
    found = measured_jobs([tmp_path])
    assert found is not None
    assert found.num_jobs == 2
    assert measured_jobs([tmp_path / "none"]) is None


@pytest.mark.parametrize(
    ("name", "minutes"),
    [("gpu", 10), ("gpu-ep2", 15), ("gpu-ep4", 10), ("gpu-ep8", 15), ("gpu-ep-scaling", 15), ("gpu-ep2-as-ep8", 15)],
)
def test_the_suites_of_gpus_fit_an_h200_and_end_within_minutes(name: str, minutes: int) -> None:
    """An H200 has 141 GB. A similar job has been measured for most jobs of these suites."""
    found = forecast(load_sweep(available_sweeps()[name]).jobs(), measured_jobs(PUBLISHED))
    assert found.memory_bytes < 140 * 10**9
    assert found.time_s is not None
    assert found.num_untimed < len(found.jobs) / 4
    assert found.time_s * len(found.jobs) / (len(found.jobs) - found.num_untimed) < 60 * minutes
