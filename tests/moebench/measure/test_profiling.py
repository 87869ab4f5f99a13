"""The profiler names the operator that really ran, whatever the backend is called."""

import json
from types import SimpleNamespace

import pytest
import torch

from experts.registry import get_backend
from moebench.measure import profiling
from moebench.measure.profiling import executed, trace
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
