"""Cases, backends and machines are named so that no two are confused."""

from typing import Any

import pytest

from moebench.case import Case, Job
from moebench.frame import to_frame
from moebench.labels import backend_labels, describe, in_case_order, in_order, machine
from moebench.record import Record, Status, record

SHAPE: dict[str, Any] = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 32}


def case(**fields: Any) -> Case:
    return Case(**{"num_tokens": 8, "dtype": "float32", **SHAPE, **fields})


def ok(of: Case | None = None, run_id: str = "r", **measured: Any) -> Record:
    measured = {"time_ms": 1.5, "parity_worst": 0.25, **measured}
    return record(Job(case=of or case(), backend="loop"), Status.ok, run_id=run_id, env_id="e", **measured)


def crashed() -> Record:
    return record(Job(case=case(), backend="gmm"), Status.crash, run_id="r", env_id="e", detail="why")


def test_describe_keeps_what_differs_and_states_the_rest_once() -> None:
    of = [case(num_tokens=8, masked_share=0.25), case(num_tokens=16, masked_share=0.25, routing="zipf:1.2", seed=3)]
    described = describe(to_frame([ok(of=one) for one in of]))
    assert described.labels.tolist() == ["8 uniform", "16 zipf:1.2 seed 3"]
    assert described.title() == "e4k2d16i32, float32, forward, swiglu, 25% masked"


@pytest.mark.parametrize("field", [name for name in Case.model_fields if name != "moe_inter_dim"])
def test_no_two_cases_are_described_alike(field: str) -> None:
    other: dict[str, Any] = {
        "num_tokens": 16,
        "n_routed_experts": 8,
        "n_activated_experts": 1,
        "dim": 64,
        "mode": "train",
        "dtype": "float16",
        "model": "olmoe",
        "expert_activation": "relu2",
        "expert_bias": True,
        "activation_alpha": 1.0,
        "activation_limit": 5.0,
        "swiglu_limit": 10.0,
        "apply_router_weight_after_down": True,
        "routing": "one-hot",
        "masked_share": 0.5,
        "ep_size": 2,
        "seed": 5,
    }
    labels = describe(to_frame([ok(of=case()), ok(of=case(**{field: other[field]}))])).labels
    assert labels.nunique() == 2


def test_the_machine_is_named_with_the_date_of_the_run() -> None:
    gpu = {"device": "cuda", "gpu": "NVIDIA H200", "l2": "cold"}
    assert machine(to_frame([ok(run_id="20261123-101500-quick", **gpu)])) == "NVIDIA H200, L2 cold, 2026-11-23"
    assert machine(to_frame([ok(run_id="2026-11-23T10:15", device="cpu")])) == "CPU, 2026-11-23"
    assert machine(to_frame([ok(run_id="3f2a")])) == ""


def test_a_crashed_row_gets_the_machine_of_its_run() -> None:
    ordered = in_case_order(to_frame([ok(device="cuda", gpu="NVIDIA H200"), crashed()]))
    assert ordered["gpu"].tolist() == ["NVIDIA H200"] * 2
    assert ordered["device"].tolist() == ["cuda"] * 2


def test_backends_stand_in_one_order_with_the_reference_first() -> None:
    jobs = [("torch_mm", "local"), ("te", "deepep"), ("te", "alltoall"), ("loop", "local")]
    frame = to_frame(
        record(Job(case=case(), backend=backend, dispatcher=dispatcher), Status.oom, run_id="r", env_id="e", detail="d")
        for backend, dispatcher in jobs
    )
    assert in_order(backend_labels(frame)) == ["loop", "te+alltoall", "te+deepep", "torch_mm"]
