"""What only a CUDA GPU can show: events, the second-level cache, the caching allocator, and a run on the GPU."""

import ctypes
import os
from pathlib import Path

import pytest
import torch

from moebench.measure import memory, samplers, timing
from moebench.measure.samplers import captured
from moebench.measure.timing import TimingPolicy
from moebench.parity import passes
from moebench.parity.poison import poisoned
from moebench.results.record import Status
from moebench.run.runner import Plan, execute
from moebench.workload.case import Case, Job
from moebench.workload.spec import Policy, load_sweep

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[3]
MIB = 1 << 20


@pytest.fixture(scope="module")
def gpu():
    return torch.device("cuda", torch.cuda.current_device())


def measured(stages, gpu, *, cold_l2=True, prepare=lambda: None, target=0.005, cap_s=0.5):
    for stage in stages:
        stage()
    return timing.time_stages(stages, gpu, TimingPolicy(target, cap_s, cold_l2), prepare)


def wait(milliseconds):
    """Return a stage that keeps the GPU busy for this many milliseconds at 2 GHz, and longer at a lower clock."""
    return lambda: torch.cuda._sleep(int(milliseconds * 2e6))


# timing


def test_a_graph_replays_what_was_captured_and_leaves_no_memory(gpu):
    a = torch.randn(256, 256, device=gpu)
    right = a @ a  # each stream gets a workspace when it makes its first product
    results = []
    stages = [lambda: results.append(a @ a)]
    with captured(stages, results.clear, gpu):
        pass  # the library's workspace is allocated once and stays
    before = torch.cuda.memory_allocated()
    with captured(stages, results.clear, gpu) as replay:
        results[0].zero_()
        replay()
        torch.cuda.synchronize()
        assert torch.allclose(results[0], right)
        del replay  # the replay holds the graph
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_a_call_that_waits_cannot_be_captured_and_the_gpu_goes_on(gpu):
    with captured([lambda: torch.ones(1, device=gpu).item()], lambda: None, gpu) as replay:
        assert replay is None
    assert float(torch.ones(2, device=gpu).sum()) == 2.0
    assert 0 <= float(torch.rand(1, device=gpu)) < 1, "torch's generator is in no capture any more"


def test_a_clock_is_read(gpu):
    found = measured([wait(0.5)], gpu)
    assert found.sm_clock_mhz is None or found.sm_clock_mhz > 300
    assert len(found.marked) == len(found.samples_ms)


# ceilings


def test_ceilings_are_of_the_same_order_as_the_layer_that_they_bound(rows):
    layer = next(row for row in rows if row.backend == "torch_mm" and row.dtype == "bfloat16")
    assert 0 < layer.grouped_ms < layer.time_ms
    assert 0 < layer.roofline_ms < layer.time_ms
    assert 0 < layer.roofline_fraction < 1
    assert layer.copy_gb_per_s > 100
    assert 0 < layer.graph_time_ms <= 1.1 * layer.time_ms


# timing of stages


def test_a_copy_that_fits_the_cache_is_slower_where_the_cache_is_cold(gpu):
    source = torch.ones(8 * MIB, dtype=torch.uint8, device=gpu)
    target = torch.empty_like(source)
    cold, warm = (measured([lambda: target.copy_(source)], gpu, cold_l2=cold) for cold in (True, False))
    assert warm.time_ms_high < cold.time_ms_low


def test_the_time_is_the_devices_and_neither_flush_nor_prepare_is_in_it(gpu):
    """The work takes half a millisecond, the preparation five; a GPU's clock lies between 0.5 and 2.5 GHz."""
    found = measured([wait(0.5)], gpu, prepare=wait(5.0))
    assert 0.4 <= found.time_ms < 2.1
    assert found.host_time_ms >= found.time_ms
    assert found.flags == ()


def test_stages_are_timed_one_by_one(gpu):
    found = measured([wait(0.2), wait(0.8)], gpu)
    assert len(found.stage_ms) == 2
    assert found.stage_ms[1] == pytest.approx(4 * found.stage_ms[0], rel=0.2)
    assert found.time_ms == pytest.approx(sum(found.stage_ms), rel=0.05)


def test_many_small_kernels_do_not_wait_for_the_host(gpu):
    """The launches take longer than the kernels, but the measured time must not include idle gaps between kernels."""
    small = torch.zeros(256, device=gpu)

    def launches():
        for _ in range(50):
            small.add_(1)

    found = measured([launches], gpu)
    assert found.flags == ()
    assert found.time_ms < found.host_time_ms


@pytest.mark.parametrize("cold_l2", [True, False])
def test_a_kernel_shorter_than_its_launch_is_timed_by_the_device(gpu, cold_l2):
    small = torch.zeros(256, device=gpu)
    for _ in range(3):
        found = measured([lambda: small.add_(1)], gpu, cold_l2=cold_l2)
        assert found.time_ms < found.host_time_ms / 2


def test_a_call_that_waits_for_the_device_is_flagged(gpu):
    small = torch.zeros(256, device=gpu)

    def waits():
        small.add_(1)
        small.sum().item()

    assert measured([waits], gpu).flags == ("synchronises",)


def test_a_copy_after_the_sample_lacks_what_another_stream_still_writes(gpu):
    """The copies are made behind the event that ends the sample, in the stream of the call."""
    target, other, copies = torch.zeros(256, device=gpu), torch.cuda.Stream(gpu), []

    def late():
        other.wait_stream(torch.cuda.current_stream(gpu))
        with torch.cuda.stream(other):
            torch.cuda._sleep(20_000_000)
            target.fill_(1)

    def prepare():
        torch.cuda.synchronize(gpu)
        target.zero_()

    timing.time_stages([late], gpu, TimingPolicy(1e9, 0.0), prepare, keep=lambda: copies.append(target.clone()))
    torch.cuda.synchronize(gpu)
    assert all(float(copy.sum()) == 0 for copy in copies)


def test_what_is_set_aside_in_l2_is_read_and_reset(gpu):
    persisting = samplers.PersistingL2()
    torch.zeros(1, device=gpu)  # makes the context of this thread
    assert persisting._driver is not None
    before = persisting.set_aside_bytes()
    limit = samplers._LIMIT_PERSISTING_L2
    try:
        assert persisting._driver.cuCtxSetLimit(limit, ctypes.c_size_t(MIB)) == 0
        assert persisting.set_aside_bytes() >= MIB
        assert persisting._driver.cuCtxResetPersistingL2Cache() == 0
        found = measured([wait(0.2)], gpu, cap_s=0.05)
        assert found.time_ms > 0.1
    finally:
        persisting._driver.cuCtxSetLimit(limit, ctypes.c_size_t(before))


# memory


def test_known_allocations_are_exact(gpu):
    def forward():
        first = torch.empty(16 * MIB, dtype=torch.uint8, device=gpu)
        second = torch.empty(32 * MIB, dtype=torch.uint8, device=gpu)
        del first
        return second

    found = memory.measure_memory(forward, None, gpu)
    assert (found.peak_bytes, found.saved_bytes) == (48 * MIB, None)


def test_what_forward_saves_and_what_backward_adds_are_exact(gpu):
    """exp keeps its result. At the peak of backward, the gradients of the output and of x exist besides it."""
    x = torch.zeros(MIB, device=gpu, requires_grad=True)
    grad = torch.ones(MIB, device=gpu)
    found = memory.measure_memory(lambda: x.exp() * 2, lambda output: output.backward(grad), gpu)
    assert found.saved_bytes == 4 * MIB
    assert found.peak_bytes >= 12 * MIB
    assert found.peak_bytes % (4 * MIB) == 0


def test_what_is_reserved_is_whole_segments(gpu):
    """The allocator rounds a request above 10 MiB up to 2 MiB, and keeps the memory when the tensor is gone."""
    size = 1024 * MIB + MIB // 2  # more than the segments of other tests have room for
    found = memory.measure_memory(lambda: torch.empty(size, dtype=torch.uint8, device=gpu), None, gpu)
    assert (found.peak_bytes, found.reserved_bytes) == (size, 1026 * MIB)


def test_what_lives_before_the_call_and_what_died_do_not_count(gpu):
    alive = torch.empty(64 * MIB, dtype=torch.uint8, device=gpu)
    dead = torch.empty(64 * MIB, dtype=torch.uint8, device=gpu)
    del dead
    found = memory.measure_memory(lambda: torch.empty(2 * MIB, dtype=torch.uint8, device=gpu), None, gpu)
    assert found.peak_bytes == 2 * MIB
    del alive


# poison


@pytest.mark.parametrize("num_bytes", [512, 100_000, MIB, 3 * MIB, 40 * MIB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_memory_that_nobody_wrote_is_nan(gpu, num_bytes, dtype):
    clean = [torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=gpu) for _ in range(3)]
    del clean
    with poisoned(gpu):
        unwritten = [torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device=gpu) for _ in range(3)]
    assert all(tensor.isnan().all() for tensor in unwritten)


def test_poison_takes_no_more_memory_than_there_was(gpu):
    torch.cuda.synchronize()
    kept = torch.ones(MIB, device=gpu)
    for size in (1000, 300_000, 5_000_000):
        torch.zeros(size, device=gpu)
    before = torch.cuda.memory_reserved(gpu), torch.cuda.memory_allocated(gpu)
    with poisoned(gpu):
        assert (torch.cuda.memory_reserved(gpu), torch.cuda.memory_allocated(gpu)) == before
    assert bool((kept == 1).all())


def test_a_row_that_is_never_written_is_found(gpu):
    x = torch.ones(64, 128, device=gpu)

    class Layer(torch.nn.Module):
        def forward(self, x, token_mask, weights, indices):
            out = torch.empty_like(x)
            out[:-1] = x[:-1]
            return out

    from moebench.workload.inputs import Inputs

    inputs = Inputs(x, torch.ones(64, dtype=torch.bool, device=gpu), *(torch.ones(64, 1, device=gpu),) * 2, x)
    torch.zeros(64, 128, device=gpu)
    with poisoned(gpu):
        assert passes.run_pass(Layer(), inputs, "forward")["output"][-1].isnan().all()


# a run


def case(**fields):
    shape = {"num_tokens": 64, "n_routed_experts": 8, "n_activated_experts": 2, "dim": 64, "moe_inter_dim": 64}
    return Case.model_validate({**shape, "dtype": "bfloat16", "mode": "train", "expert_bias": True, **fields})


def test_breakdowns_inside_a_sweep_disturb_nothing(tmp_path, monkeypatch):
    """Run an illegal access, a hang in the driver and a really full GPU, with right backends before and after each."""
    paths = [str(ROOT / "tests" / "backends"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    sweep = load_sweep(ROOT / "tests" / "backends" / "breakdowns.toml")
    broken = {"ReadsOutOfBounds": "error", "FillsTheGpu": "oom", "HangsTheGpu": "timeout", "Segfaults": "crash"}
    names = ["loop", *(name for fault in broken for name in (f"broken:{fault}", "torch_mm"))]
    found = sweep.jobs()[0].case
    jobs = [Job(case=found.model_copy(update={"seed": n}), backend=name) for n, name in enumerate(names)]
    outcome = execute(Plan(tuple(jobs), sweep.policy, tmp_path, "run", device="cuda"))
    statuses = {(row.backend, row.seed): row.status.value for row in outcome.records}
    assert [statuses.pop((f"broken:{fault}", 2 * n + 1)) for n, fault in enumerate(broken)] == list(broken.values())
    assert set(statuses.values()) == {"ok"}
    assert len(statuses) == 5
    details = {row.backend: row.detail for row in outcome.records}
    assert "illegal memory access" in details["broken:ReadsOutOfBounds"]
    assert details["broken:FillsTheGpu"].startswith("CUDA out of memory")
    assert {row.gpu_uuid for row in outcome.records} == {outcome.records[0].gpu_uuid} != {None}
    logs = "\n".join(path.read_text() for path in (tmp_path / "logs").glob("worker-*.log"))
    assert "bytes of the GPU are still held after a failed job" in logs


def test_tricks_have_no_speed_on_a_gpu_either(tmp_path, monkeypatch):
    paths = [str(ROOT / "tests" / "backends"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    names = ["CachesByAddress", "ZeroGradsAfterManyCalls", "LazyOutput", "ComputesInAStream", "PatchesEvents"]
    modes = ["forward", "train", "forward", "forward", "train"]
    jobs = [Job(case=case(mode=mode), backend=f"cheats:{name}") for name, mode in zip(names, modes, strict=True)]
    jobs += [Job(case=case(), backend="torch_mm")]
    outcome = execute(Plan(tuple(jobs), Policy(time_cap_s=0.1, timeout_s=60.0), tmp_path, "run", device="cuda"))
    assert [(row.backend, row.status.value) for row in outcome.records] == [
        *((f"cheats:{name}", "mismatch") for name in names),
        ("torch_mm", "ok"),
    ], [row.detail for row in outcome.records]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Run right backends, wrong backends, and backends that take the GPU's memory or its context, in one run."""
    unkind = ["broken:OutOfGpuMemory", "broken:BreaksTheGpu", "faulty:UnweightedDownBias", "faulty:LeakingMask"]
    jobs = [
        Job(case=case(dtype=dtype, masked_share=0.1), backend=name)
        for dtype in ("bfloat16", "float32")
        for name in ("loop", *unkind, "torch_mm")
    ]
    jobs += [Job(case=case(), backend="triton")]
    jobs += [Job(case=case(routing=routing), backend="torch_mm") for routing in ("one-hot", "empty:0.75", "zipf:2.0")]
    policy = Policy(time_cap_s=0.1, timeout_s=60.0)
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(ROOT / "tests" / "backends"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        outcome = execute(Plan(tuple(jobs), policy, tmp_path_factory.mktemp("run"), "run", device="cuda"))
    assert outcome.num_left == 0
    return outcome.records


def test_right_backends_are_ok_whatever_runs_beside_them(rows):
    right = [row for row in rows if ":" not in row.backend]
    assert [row.detail for row in right if row.status is not Status.ok] == []
    assert len(right) == 8
    for row in right:
        assert (row.device, row.gpu, row.l2) == ("cuda", torch.cuda.get_device_name(), "cold")
        assert row.time_ms_low <= row.time_ms <= row.time_ms_high
        assert row.host_time_ms > 0
        assert 0 < row.saved_memory_bytes < row.peak_memory_bytes


def test_the_grouped_product_is_named_and_runs_without_waiting(rows):
    named = {(row.backend, row.dtype): row for row in rows}
    assert "_grouped_mm > " in named["torch_mm", "bfloat16"].executed
    assert named["triton", "bfloat16"].executed.endswith("grouped_gemm")
    assert "_grouped_mm" not in named["loop", "bfloat16"].executed
    if torch.cuda.get_device_capability() >= (9, 0):
        assert named["torch_mm", "bfloat16"].flags == ()
    assert named["loop", "bfloat16"].flags == ("synchronises",)


def test_faults_are_mismatches_and_breakdowns_what_they_are(rows):
    statuses = {(row.backend.partition(":")[2], row.dtype): row for row in rows if ":" in row.backend}
    for dtype in ("bfloat16", "float32"):
        for fault in ("UnweightedDownBias", "LeakingMask"):
            assert statuses[fault, dtype].status is Status.mismatch
            assert statuses[fault, dtype].time_ms is None
        assert statuses["OutOfGpuMemory", dtype].status is Status.oom
        assert statuses["OutOfGpuMemory", dtype].detail.startswith("CUDA out of memory")
        assert statuses["BreaksTheGpu", dtype].status in (Status.error, Status.crash)
        assert "assert" in statuses["BreaksTheGpu", dtype].detail


def test_a_row_has_the_gpus_own_time_where_the_call_waits_and_only_there(rows):
    right = [row for row in rows if ":" not in row.backend]
    assert [row for row in right if row.busy_ms is None and "synchronises" in row.flags] == []
    for row in right:
        if "synchronises" not in row.flags:
            assert (row.busy_ms, row.busy_samples_ms) == (None, None)
            continue
        assert row.busy_ms_low <= row.busy_ms <= row.busy_ms_high
        assert 0 < row.busy_ms <= 1.1 * row.time_ms
        assert len(row.busy_samples_ms) == len(row.busy_sample_rounds) >= 6
