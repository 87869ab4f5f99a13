"""Run planted faults through the real runner and worker.

Each fault is a mismatch without speed, and the right backends beside it are ok.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from experts import GroupedExperts
from experts.registry import Backend
from moebench.machine import environment
from moebench.measure import ceilings, worker
from moebench.measure import job as job_module
from moebench.measure.cache import Workload
from moebench.measure.ceilings import Ceilings
from moebench.measure.job import measure_job
from moebench.measure.profiling import Busy
from moebench.measure.protocol import WorkList
from moebench.measure.timing import TimingPolicy
from moebench.results.record import ONLY_IF_OK, Record, Status
from moebench.run.runner import Plan, execute
from moebench.workload.case import Case, Job
from moebench.workload.spec import Policy
from tests.backends.faulty import FAULTS
from tests.moebench.executed import python_path, share_workers

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
RIGHT = ("loop", "torch_mm")
FORWARD_IS_RIGHT = {name for name, tensors in FAULTS.items() if "output" not in tensors}


def case(dtype: str, mode: str = "train", **fields: object) -> Case:
    shape = {"num_tokens": 40, "n_routed_experts": 8, "n_activated_experts": 2, "dim": 32, "moe_inter_dim": 32}
    unkind = {"expert_bias": True, "masked_share": 0.1, "routing": "empty:0.25"}
    return Case.model_validate({**shape, **unkind, "dtype": dtype, "mode": mode, **fields})


CASES = [case(dtype, mode) for dtype in ("float32", "bfloat16") for mode in ("train", "forward")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Record]:
    """Run every fault beside the right backends in one worker; return rows by backend, dtype and mode."""
    backends = [RIGHT[0], *(f"faulty:{name}" for name in FAULTS), RIGHT[1]]
    jobs = tuple(Job(case=one, backend=name) for one in CASES for name in backends)
    policy = Policy(time_cap_s=0.01, interval_target=0.9, timeout_s=60.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(ROOT / "tests" / "backends", ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        share_workers(patch)
        outcome = execute(Plan(jobs, policy, tmp_path_factory.mktemp("run"), "run", device="cpu"))
    assert outcome.num_left == 0
    return {(row.backend.removeprefix("faulty:"), row.dtype, row.mode): row for row in outcome.records}


@pytest.mark.parametrize("mode", ["train", "forward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", RIGHT)
def test_a_right_backend_beside_faulty_ones_is_ok(rows, backend, dtype, mode):
    row = rows[backend, dtype, mode]
    assert (row.status, row.detail) == (Status.ok, None)
    assert 0 < row.parity_worst <= 1
    assert row.time_ms_low <= row.time_ms <= row.time_ms_high
    assert row.num_samples == len(row.samples_ms) == len(row.sample_rounds)
    assert row.tokens_per_s == pytest.approx(36 / row.time_ms * 1e3)
    assert row.tflops == pytest.approx(row_flops(mode) / row.time_ms / 1e9)
    assert (row.backward_ms is None) == (row.saved_memory_bytes is None) == (mode == "forward")
    assert row.peak_memory_bytes > 0
    assert (row.device, row.gpu, row.l2, row.graph_time_ms, row.sm_clock_mhz) == ("cpu", None, None, None, None)
    assert row.roofline_ms == row.dense_ms > 0
    assert row.roofline_fraction == pytest.approx(row.roofline_ms / row.time_ms)
    assert not any(row.sample_marked)
    assert 0 < row.setup_s + row.ceilings_s + row.parity_s + row.timing_s < row.job_s


def row_flops(mode: str) -> int:
    """Return the operations of 36 active tokens, by the convention of shared/backends.md."""
    return (3 if mode == "train" else 1) * 6 * 36 * 2 * 32 * 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_training_is_a_mismatch(rows, fault, dtype):
    row = rows[fault, dtype, "train"]
    assert row.status is Status.mismatch
    assert {name: getattr(row, name) for name in ONLY_IF_OK if getattr(row, name) is not None} == {}
    assert row.parity_worst > 1
    assert row.detail.startswith(row.parity_worst_tensor)
    wrong = {tensor for tensor, error in row.parity_errors.items() if error > 1}
    assert wrong >= FAULTS[fault]
    assert row.parity_worst_tensor in wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_in_forward_a_fault_is_seen_where_the_output_is_wrong(rows, fault, dtype):
    row = rows[fault, dtype, "forward"]
    if fault in FORWARD_IS_RIGHT - {"ScaledExpert"}:  # 2% of a part of the output may or may not exceed rounding
        assert row.status is Status.ok
    elif fault != "ScaledExpert":
        assert row.status is Status.mismatch
        assert row.parity_worst_tensor == "output"
        assert row.time_ms is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["ZeroGradOfOneExpert", "UnwrittenGradOfEmptyExperts"])
def test_a_fault_in_one_gradient_accuses_no_other(rows, fault, dtype):
    errors = rows[fault, dtype, "train"].parity_errors
    assert {tensor for tensor, error in errors.items() if error > 1} == FAULTS[fault]
    assert "expert" in rows[fault, dtype, "train"].detail


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_details_name_what_is_wrong(rows, dtype):
    assert "weights.grad (is None)" in rows["DetachedRoutingWeight", dtype, "train"].detail
    assert "output (token " in rows["DroppedToken", dtype, "forward"].detail
    assert "down_projs.grad (expert " in rows["ZeroGradOfOneExpert", dtype, "train"].detail
    assert ": error 1, budget 0.0" in rows["ZeroGradOfOneExpert", "bfloat16", "train"].detail
    for fault in ("UnwrittenRow", "LeakingMask"):
        assert rows[fault, dtype, "train"].parity_errors["output"] == math.inf


def test_only_rows_that_nobody_wrote_are_infinitely_wrong(rows):
    row = rows["DroppedToken", "float32", "train"]
    assert all(error < math.inf for error in row.parity_errors.values())


class Recorder(GroupedExperts):
    """Right experts that keep their input."""

    calls: ClassVar[list[tuple[torch.Tensor, torch.Tensor, bool]]] = []

    def forward(self, x, token_mask, weights, indices):
        self.calls.append((x, x.detach().clone(), torch.is_grad_enabled()))
        return super().forward(x, token_mask, weights, indices)


POLICY = TimingPolicy(interval_target=0.9, time_cap_s=0.01)


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the workloads of these tests time a small copy; test_ceilings.py times one of the true size."""
    monkeypatch.setitem(ceilings.COPIED_BYTES, "cpu", 1 << 20)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    backend = Backend("recorder", Recorder, lambda device, config: None)
    monkeypatch.setattr("moebench.measure.subject.get_backend", lambda name: backend)
    monkeypatch.setattr(Recorder, "calls", [])
    return Recorder


def test_no_call_of_a_step_in_micro_batches_has_more_tokens_than_a_micro_batch(recorder):
    """A layer may reserve room in its first call, as symm_mem does, and every later call must fit in there."""
    job = Job(case=case("float32", context="accumulate:3"), backend="recorder")
    assert measure_job(job, Workload(CPU), POLICY)["status"] is Status.ok
    assert {len(values) for _, values, _ in recorder.calls} == {13, 14}


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_forward_runs_without_gradients_and_train_with(recorder, mode):
    measured = measure_job(Job(case=case("float32", mode), backend="recorder"), Workload(CPU), POLICY)
    assert measured["status"] is Status.ok
    # the last call checks the output once more after timing, without gradients
    assert {enabled for *_, enabled in recorder.calls[:-1]} == {mode == "train"}
    assert len(recorder.calls) > measured["num_samples"]


def test_quantised_weights_are_weighed_before_the_time_is_measured(recorder, monkeypatch):
    """A CUDA graph, which is captured while the time is measured, makes a layer keep more."""
    monkeypatch.setattr(Recorder, "cached_weight_bytes", 7)
    time = job_module._Job._time

    def keep_more(*given):
        monkeypatch.setattr(Recorder, "cached_weight_bytes", 14)
        return time(*given)

    monkeypatch.setattr(job_module._Job, "_time", keep_more)
    measured = measure_job(Job(case=case("float32"), backend="recorder"), Workload(CPU), POLICY)
    assert (measured["status"], measured["cached_weight_bytes"]) == (Status.ok, 7)


class Worn(GroupedExperts):
    """Right in as many calls as parity looks at, and wrong later. Its output always lies in the same memory."""

    num_calls = 0

    def forward(self, x, token_mask, weights, indices):
        out = super().forward(x, token_mask, weights, indices).detach()
        self.num_calls += 1
        self.kept = getattr(self, "kept", out)
        return self.kept.copy_(out if self.num_calls <= 2 else 0 * out)


def test_what_goes_wrong_while_it_is_timed_is_a_mismatch(monkeypatch):
    monkeypatch.setattr(
        "moebench.measure.subject.get_backend", lambda name: Backend("worn", Worn, lambda device, config: None)
    )
    measured = measure_job(Job(case=case("float32", "forward"), backend="worn"), Workload(CPU), POLICY)
    assert (measured["status"], measured["parity_worst_tensor"]) == (Status.mismatch, "output")
    assert "time_ms" not in measured


def test_backends_of_a_case_get_the_same_inputs_and_none_gets_anothers_tensors(recorder):
    workload = Workload(CPU)
    for _ in range(2):
        measure_job(Job(case=case("float32"), backend="recorder"), workload, POLICY)
    (first, read_first, _), (last, read_last, _) = recorder.calls[0], recorder.calls[-1]
    torch.testing.assert_close(read_first, read_last, equal_nan=True, rtol=0, atol=0)
    assert first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr()


def test_each_timed_call_reads_values_that_no_call_has_read(recorder):
    measured = measure_job(Job(case=case("float32"), backend="recorder"), Workload(CPU), POLICY)
    read = [tuple(values.nan_to_num().flatten().tolist()) for _, values, _ in recorder.calls]
    assert len(set(read)) == 1 + measured["num_samples"]


def bounds_of(*dense_ms):
    """Return a stand-in for the measuring of ceilings that finds these times of the products, one after the other."""
    found = list(dense_ms)

    def measure_ceilings(*given):
        return Ceilings(found.pop(0), None, None, copy_gb_per_s=10.0, least_bytes=0)

    return found, measure_ceilings


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_time_that_stays_impossibly_short_is_a_mismatch(monkeypatch, mode):
    left, stand_in = bounds_of(1e9, 1e9, 2e9)
    monkeypatch.setattr(ceilings, "measure_ceilings", stand_in)
    measured = measure_job(Job(case=case("float32", mode), backend="loop"), Workload(CPU), POLICY)
    assert measured["status"] is Status.mismatch
    assert re.fullmatch(
        r"impossibly fast: [\d.]+ ms, but its matrix products alone took 2e\+09 ms; "
        r"3 times in turn the time was less than 0\.8 of such a limit",
        measured["detail"],
    )
    assert left == [], "each repetition measures the ceilings anew"
    assert {name for name in ONLY_IF_OK if measured.get(name) is not None} == set()
    assert measured["parity_worst"] <= 1


def test_one_disturbed_ceiling_accuses_nobody(monkeypatch):
    left, stand_in = bounds_of(1e9, 1e-9)
    monkeypatch.setattr(ceilings, "measure_ceilings", stand_in)
    measured = measure_job(Job(case=case("float32"), backend="loop"), Workload(CPU), POLICY)
    assert (measured["status"], measured["roofline_ms"], left) == (Status.ok, 1e-9, [])


def test_slow_products_in_16_bits_on_a_cpu_are_no_limit(monkeypatch):
    _, stand_in = bounds_of(1e9)
    monkeypatch.setattr(ceilings, "measure_ceilings", stand_in)
    measured = measure_job(Job(case=case("bfloat16"), backend="loop"), Workload(CPU), POLICY)
    assert measured["status"] is Status.ok


@pytest.mark.parametrize(
    ("device", "cold", "dtype", "is_limit"),
    [
        ("cuda", True, "bfloat16", True),
        ("cuda", False, "bfloat16", False),
        ("cpu", True, "float32", True),
        ("cpu", False, "float64", True),
        ("cpu", True, "float16", False),
    ],
)
def test_what_is_a_limit(device, cold, dtype, is_limit):
    policy = TimingPolicy(interval_target=0.9, time_cap_s=0.01, cold_l2=cold)
    one = job_module._Job(Job(case=case(dtype), backend="loop"), Workload(torch.device(device)), policy)
    bounds = Ceilings(None, None, None, copy_gb_per_s=1.0, least_bytes=1_000_000)
    assert bool(one._impossible(SimpleNamespace(time_ms=0.79), bounds)) == is_limit
    assert one._impossible(SimpleNamespace(time_ms=0.81), bounds) == ""


def test_a_part_inside_another_counts_once(monkeypatch):
    now = iter([0.0, 10.0, 13.0, 20.0])
    monkeypatch.setattr(job_module.clock, "perf_counter", lambda: next(now))
    phases = job_module.clock.Phases(CPU)
    with phases.of("timing_s"), phases.of("parity_s"):
        pass
    assert phases.spent_s == {"parity_s": 3.0, "timing_s": 17.0}


def test_parameters_are_kept_across_cases_that_share_them_and_made_anew_for_others():
    workload = Workload(CPU)
    kept = workload.parameters(case("float32"))
    assert workload.parameters(case("float32", num_tokens=3, mode="forward", routing="uniform")) is kept
    for other in (case("float32", seed=1), case("bfloat16"), case("float32", expert_activation="geglu")):
        assert workload.parameters(other) is not kept


@pytest.mark.parametrize("backend", RIGHT)
def test_no_tokens_and_no_active_tokens_are_cases_like_others(backend):
    for one in (case("float32", num_tokens=0), case("float32", masked_share=1.0)):
        measured = measure_job(Job(case=one, backend=backend), Workload(CPU), POLICY)
        assert (measured["status"], measured["parity_worst"]) == (Status.ok, 0.0)


def test_what_an_engine_cannot_take_is_unsupported_with_the_rule():
    measured = measure_job(Job(case=case("float64"), backend="torch_mm"), Workload(CPU), POLICY)
    assert measured["status"] is Status.unsupported
    assert "float64" in measured["detail"]
    assert measured.keys() == {"status", "detail"}


@pytest.mark.parametrize(
    ("device", "flags", "host_time_ms", "num_calls"),
    [
        ("cuda", ("synchronises",), 1.0, 20),
        ("cuda", ("clock_changed", "synchronises"), 50.0, 10),
        ("cuda", ("synchronises",), 1e3, 6),
        ("cuda", ("clock_changed",), 1.0, None),
        ("cpu", ("synchronises",), 1.0, None),
    ],
)
def test_the_gpus_own_time_is_profiled_only_where_a_call_waits_for_the_gpu(
    monkeypatch, device, flags, host_time_ms, num_calls
):
    profiled, cleared = [], []

    def stand_in(stages, device, num_calls, cold_l2, prepare, ranks):
        profiled.append((stages, num_calls, cold_l2, prepare))
        return Busy((1.5,) * num_calls)

    monkeypatch.setattr(job_module, "busy_of_calls", stand_in)
    policy = TimingPolicy(interval_target=0.005, time_cap_s=2.0)
    one = job_module._Job(Job(case=case("bfloat16"), backend="loop"), Workload(torch.device(device)), policy)
    call = SimpleNamespace(stages=["forward"], clear=lambda: cleared.append(None))
    timed = SimpleNamespace(flags=flags, host_time_ms=host_time_ms, time_ms=1.5)
    found = one._busy(call, SimpleNamespace(prepare="draw"), timed)
    assert len(found.samples_ms) == (num_calls or 0)
    assert profiled == ([(["forward"], num_calls, True, "draw")] if num_calls else [])
    assert len(cleared) == len(profiled)
    timed.time_ms = 1.0
    assert one._busy(call, SimpleNamespace(prepare="draw"), timed).flags == (("no_busy_time",) if num_calls else ())


@pytest.mark.parametrize("busy", [Busy((1.0, 1.5, 2.0)), Busy(unknown="lost"), Busy()])
def test_the_columns_and_flags_of_the_gpus_own_time_are_in_the_record(monkeypatch, busy):
    monkeypatch.setattr(job_module._Job, "_busy", lambda *given: busy)
    one = Job(case=case("float32"), backend="loop")
    measured = measure_job(one, Workload(CPU), POLICY)
    assert measured["status"] is Status.ok
    assert measured.get("busy_ms") == (1.5 if busy.samples_ms else None)
    assert measured["flags"] == busy.flags
    assert measured.get("detail") == ("busy_ms is not known: lost" if busy.unknown else None)
    monkeypatch.setattr(worker, "run_job", lambda *given: measured)
    described = environment.collect("cpu")
    row = worker._row(one, Workload(CPU), POLICY, WorkList(policy=Policy(), run_id="r", round=3), described)
    assert (row.status, row.busy_samples_ms) == (Status.ok, busy.samples_ms or None)
    assert row.busy_sample_rounds == ((3, 3, 3) if busy.samples_ms else None)
