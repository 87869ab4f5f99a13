"""A run on two GPUs times CUDA graphs where all ranks can capture the call, and loses no row where one cannot."""

from pathlib import Path

import pytest
import torch

from moebench.results.record import Record
from moebench.run.runner import Plan, execute
from moebench.workload.case import Case, Job
from moebench.workload.spec import Policy
from tests.moebench.executed import python_path, share_workers

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]
SHAPE = {"n_routed_experts": 16, "n_activated_experts": 4, "dim": 2048, "moe_inter_dim": 768, "dtype": "bfloat16"}
MODES = ("forward", "train")


def job(backend: str, dispatcher: str, mode: str, **fields: object) -> Job:
    case = Case.model_validate({**SHAPE, "num_tokens": 512, "ep_size": 2, "mode": mode, **fields})
    return Job(case=case, backend=backend, dispatcher=dispatcher)


REPLAYED = [
    *(job(engine, "symm_mem", mode) for engine in ("torch_mm", "triton") for mode in MODES),
    *(job("triton", "symm_mem", "train", rank_load=load) for load in ("uneven", "one-empty")),
    job("torch_mm", "symm_mem", "train", expert_bias=True, masked_share=0.25, routing="zipf"),
]
#: The host reads sizes on the device.
WAITING = [
    *(job("torch_mm", dispatcher, mode) for dispatcher in ("alltoall", "deepep") for mode in MODES),
    *(job("loop", "symm_mem", mode) for mode in MODES),
]
#: The second rank fails while it captures. A right job follows each of them.
FAILING = [
    one
    for seed, name in enumerate(("ranks:RefusesGraphs", "ranks:WaitsInGraphs"), start=1)
    for one in (*(job(name, "symm_mem", mode) for mode in MODES), job("torch_mm", "symm_mem", "train", seed=seed))
]
JOBS = [*REPLAYED, *WAITING, *FAILING]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[Job, Record]:
    """Return the row of each job of one run, in which all backends share one group of ranks."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    policy = Policy(time_cap_s=0.2, timeout_s=120.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(ROOT / "tests" / "backends", ROOT))
        share_workers(patch)
        outcome = execute(Plan(tuple(JOBS), policy, tmp_path_factory.mktemp("run"), "run", device="cuda"))
    return dict(zip(JOBS, outcome.records, strict=True))


def in_short(one: Job) -> str:
    return f"{one.backend}-{one.dispatcher}-{one.case.mode}-{one.case.rank_load}-{one.case.seed}"


@pytest.mark.parametrize("one", REPLAYED, ids=in_short)
def test_a_call_that_does_not_wait_is_replayed_on_all_ranks(one: Job, rows: dict[Job, Record]) -> None:
    """A graph that does the work of the call cannot take a small part of its time."""
    row = rows[one]
    assert (row.status.value, row.detail) == ("ok", None)
    assert "synchronises" not in row.flags
    assert row.graph_time_ms is not None, "it was captured, and the replays that were judged are right"
    assert row.time_ms / 2 < row.graph_time_ms < 1.5 * row.time_ms


@pytest.mark.parametrize("one", WAITING, ids=in_short)
def test_a_call_that_waits_has_no_time_of_a_graph(one: Job, rows: dict[Job, Record]) -> None:
    row = rows[one]
    if row.status.value == "unsupported" and one.dispatcher == "deepep":
        pytest.skip(str(row.detail))
    assert (row.status.value, row.graph_time_ms) == ("ok", None), row.detail
    assert "synchronises" in row.flags


@pytest.mark.parametrize("one", FAILING, ids=in_short)
def test_a_rank_that_cannot_capture_costs_the_row_only_the_time_of_the_graph(one: Job, rows: dict[Job, Record]) -> None:
    row = rows[one]
    assert (row.status.value, row.detail) == ("ok", None)
    assert row.time_ms > 0
    assert "synchronises" not in row.flags, "the capture was tried"
    assert (row.graph_time_ms is None) == one.backend.startswith("ranks:")
