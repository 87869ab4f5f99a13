"""The profiler names the operator that really ran, whatever the backend is called."""

import json
from types import SimpleNamespace

import pytest
import torch

from experts.registry import get_backend
from moebench.measure import profiling
from moebench.measure.profiling import COMMUNICATION, Busy, busy_in_calls, executed, trace
from moebench.workload.case import Case
from moebench.workload.inputs import make_inputs, make_parameters, moe_config

CPU = torch.device("cpu")
CASE = Case(
    num_tokens=64,
    n_routed_experts=4,
    n_activated_experts=2,
    dim=128,
    moe_inter_dim=128,
    dtype="float32",
    mode="forward",
)


def ran(backend, case=CASE):
    module = get_backend(backend).build(moe_config(case))
    module.load_state_dict(make_parameters(case, CPU))
    inputs = make_inputs(case, CPU)
    with torch.no_grad():
        return executed(lambda: module(inputs.x_TD, inputs.token_mask_T, inputs.weights_TK, inputs.indices_TK), CPU)


def test_loop_runs_a_matrix_product_an_expert():
    assert ran("loop").split(" > ")[-1] == "aten::mm"


def test_torch_mm_runs_the_grouped_product():
    assert "aten::_grouped_mm" in ran("torch_mm").split(" > ")


def test_the_outermost_operator_leads_to_the_innermost():
    a = torch.rand(256, 256)
    assert executed(lambda: torch.nn.functional.linear(a, a), CPU).startswith("aten::linear > aten::")
    assert executed(lambda: a @ a, CPU) == "aten::matmul > aten::mm"


@pytest.mark.parametrize("call", [lambda: None, lambda: sum(range(10))])
def test_a_call_without_operators_has_none(call):
    assert executed(call, CPU) is None


def test_a_trace_has_the_operators_of_each_call(tmp_path):
    a = torch.rand(8, 8)
    cleared = []
    path = tmp_path / "deep" / "trace.json"
    trace([lambda: a @ a, lambda: a + a], lambda: cleared.append(None), CPU, path)
    events = json.loads(path.read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    calls = sorted(name for name in names if str(name).startswith("call "))
    assert calls == [f"call {number}" for number in range(len(cleared))] != []
    assert names.count("aten::mm") == names.count("aten::add") == len(cleared)
    (product, *_) = (event for event in events if event.get("name") == "aten::mm")
    assert [8, 8] in product["args"]["Input Dims"]


def test_a_kernel_that_no_operator_launched_is_named_too():
    """Triton and libraries with their own bindings launch such kernels; profilers list them apart from operators."""

    def event(name, duration, on_gpu=True, kernels=(), annotation=False):
        return SimpleNamespace(
            name=name,
            kernels=[SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels],
            cpu_parent=None,
            device_type=SimpleNamespace(name="CUDA" if on_gpu else "CPU"),
            is_user_annotation=annotation,
            time_range=SimpleNamespace(elapsed_us=lambda: duration),
        )

    events = [
        event("aten::mm", 1, on_gpu=False, kernels=[("nvjet", 5.0)]),
        event("aten::add", 1, on_gpu=False, kernels=[("add", 2.0)]),
        *(event("nvjet", 5.0), event("add", 2.0), event("grouped_gemm", 7.0), event("grouped_gemm", 8.0)),
        event("call 0", 30.0, annotation=True),
    ]
    found = profiling._gpu_kernels(SimpleNamespace(events=lambda: events))
    assert found == [("aten::mm > nvjet", 5.0), ("aten::add > add", 2.0), ("grouped_gemm", 7.0), ("grouped_gemm", 8.0)]


class Profile:
    """Events of a profile as torch's profiler lists them, with the times in microseconds."""

    def __init__(self):
        self.events = []

    def add(self, name, start, end, on_gpu=True, launch="cudaLaunchKernel", annotation=False):
        ident = len(self.events)
        kind = SimpleNamespace(name="CUDA" if on_gpu else "CPU")
        event = SimpleNamespace(
            name=name,
            id=ident,
            device_type=kind,
            is_user_annotation=annotation,
            time_range=SimpleNamespace(start=start, end=end),
        )
        self.events.append(event)
        if on_gpu and launch:
            host = SimpleNamespace(name="CPU")
            self.events.append(SimpleNamespace(**{**vars(event), "name": launch, "device_type": host}))
        return self

    def call(self, start, *work):
        """Add a call between two marks. `work` has (start, end) of a kernel, or (name, start, end)."""
        self.add(SPIN, start, start + 1)
        for one in work:
            name, begin, end = one if len(one) == 3 else ("gemm", *one)
            self.add(name, start + 10 + begin, start + 10 + end)
        return self.add(SPIN, start + 900, start + 901)

    def busy(self, num_calls, left_out=None):
        return busy_in_calls(reversed(self.events), num_calls, left_out)


COLUMNS = ("busy_ms", "busy_ms_low", "busy_ms_high", "busy_samples_ms")
SPIN = "at::cuda::(anonymous namespace)::spin_kernel(long)"


def test_the_gpu_is_busy_where_anything_runs_and_overlaps_count_once():
    gaps = [(0, 100), (150, 250)]
    overlap = [(0, 100), (50, 150)]  # two streams
    inside = [(0, 200), (50, 60), (70, 190)]
    touching = [(0, 100), (100, 130)]
    found = Profile().call(0, *gaps).call(1000, *overlap).call(2000, *inside).call(3000, *touching).busy(4)
    assert found == Busy((0.2, 0.15, 0.2, 0.13))


def test_what_runs_between_two_calls_does_not_count():
    """Between calls, inputs are drawn and the L2 cache is flushed."""
    profile = Profile().add("normal_", -50, -10).call(0, (0, 100)).add("fill", 905, 990).call(1000, (0, 300))
    assert profile.busy(2) == Busy((0.1, 0.3))


def test_copies_and_memsets_count_and_annotations_and_the_host_do_not():
    profile = Profile().add(SPIN, 0, 1)
    profile.add("Memcpy DtoH (Device -> Pageable)", 10, 30, launch=None).add("Memset (Device)", 40, 45, launch=None)
    profile.add("call 0", 2, 890, launch=None, annotation=True).add("cudaStreamSynchronize", 2, 890, on_gpu=False)
    assert profile.add(SPIN, 900, 901).busy(1) == Busy((0.025,))


@pytest.mark.parametrize("launch", ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cuLaunchKernel"])
def test_a_lost_kernel_leaves_the_time_unknown(launch):
    profile = Profile().call(0, (0, 100), (200, 300))
    whole = profile.busy(1)
    profile.add("cudaMalloc", 1, 2, on_gpu=False).add(launch, 500, 501, on_gpu=False)
    assert whole == Busy((0.2,))
    lost = profile.busy(1)
    assert (lost.samples_ms, lost.unknown) == ((), "the profiler recorded 4 of 5 kernels")
    assert lost.flags == ("no_busy_time",)
    assert lost.columns == {**dict.fromkeys(COLUMNS), "detail": f"busy_ms is not known: {lost.unknown}"}


def test_an_empty_profile_and_lost_marks_leave_the_time_unknown():
    assert Profile().busy(1).unknown == "the profiler recorded 0 of 0 kernels"
    assert Profile().add("gemm", 0, 9, launch=None).busy(1).unknown == "the profiler recorded 0 of 0 kernels"
    assert Profile().call(0, (0, 9)).busy(2).unknown == "the profile has 2 marks around 2 calls, not 4"
    assert Profile().call(0, (SPIN, 0, 9)).busy(1).unknown == "the profile has 3 marks around 1 calls, not 2"


NCCL = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
WAITING = (
    *(NCCL, "void deep_ep::intranode::dispatch<8, 768>(int4*, float*)", "deep_ep::internode_ll::combine()"),
    *("c10d::symmetric_memory::barrier_kernel(unsigned int**)", "nvshmemi_barrier", "_symm_mem_push_rows"),
)


@pytest.mark.parametrize("name", WAITING)
def test_under_expert_parallelism_kernels_that_wait_for_others_do_not_count(name):
    profile = Profile().call(0, (0, 100), (name, 50, 400), (500, 520))
    assert profile.busy(1, COMMUNICATION) == Busy((0.12,))
    assert profile.busy(1) == Busy((0.42,)), "on one rank every kernel counts, whatever its name is"


@pytest.mark.parametrize(
    "name", ["deep_ep::layout::get_dispatch_layout()", "nvjet_hsh_128x256", "grouped_gemm", "barrier"]
)
def test_kernels_that_compute_count_under_expert_parallelism(name):
    assert Profile().call(0, (name, 0, 100)).busy(1, COMMUNICATION) == Busy((0.1,))


def test_the_rank_that_is_busy_longest_counts_call_by_call():
    assert profiling._busiest([Busy((1.0, 3.0)), Busy((2.0, 2.5))]) == Busy((2.0, 3.0))
    lost = profiling._busiest([Busy((1.0, 3.0)), Busy(unknown="lost")])
    assert (lost.samples_ms, lost.unknown) == ((), "rank 1: lost")
    assert profiling._busiest([Busy((0.0, 1.0))]).unknown == "the profile has a call without work on a GPU"


def test_more_work_than_the_call_takes_is_not_believed():
    busy = Busy((1.0, 1.05, 9.0))
    assert busy.within(1.0) == busy, "other calls were profiled, and a single one may take longer"
    assert busy.within(0.9).unknown == "the profile has 1.05 ms of work in a call of 0.9 ms"
    assert Busy().within(1.0) == Busy()
    assert (Busy().columns, Busy().flags) == (dict.fromkeys(COLUMNS), ())


def test_the_columns_have_the_median_with_its_interval():
    found = Busy(tuple(1 + 0.01 * number for number in (0, 6, 1, 5, 2, 4, 3))).columns
    assert found["busy_ms"] == pytest.approx(1.03)
    assert 1.0 <= found["busy_ms_low"] < 1.03 < found["busy_ms_high"] <= 1.06
    assert len(found["busy_samples_ms"]) == 7


def disturbed(calls, when):
    """Return a call that makes a matrix product; in the call numbered `when`, another long operation runs before it."""
    a = torch.rand(256, 256)

    def call():
        calls.append(None)
        if len(calls) == when:
            torch.linalg.svd(torch.rand(200, 200))
        return a @ a

    return call


@pytest.mark.parametrize("when", [1, 2, 3])
def test_what_happens_in_one_call_alone_is_not_what_ran(when):
    """The first call compiles, and other work may disturb any call."""
    calls = []
    assert executed(disturbed(calls, when), CPU) == "aten::matmul > aten::mm"
    assert len(calls) >= 3
