"""Cases, backends and machines get names that tell them apart."""

from typing import Any

import pytest

from moebench.results.frame import to_frame
from moebench.results.labels import backend_labels, describe, in_case_order, in_order, machine, panel_title
from moebench.results.record import Record, Status, record
from moebench.workload.case import Case, Job

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
    assert described.labels == ["8 uniform", "16 zipf:1.2 seed 3"]
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
        "rank_load": "uneven",
        "context": "compile",
        "dp_size": 3,
        "subject": "block:olmoe",
        "seed": 5,
    }
    ranks = {"rank_load": {"ep_size": 2}, "dp_size": {"context": "fsdp2", "dp_size": 2}}.get(field, {})
    described = describe(to_frame([ok(of=case(**ranks)), ok(of=case(**{**ranks, field: other[field]}))]))
    assert len(set(described.labels)) == len(set(described.headings)) == 2
    assert "" not in set(described.headings)


def test_the_load_of_the_ranks_is_said_in_words_unless_it_is_even() -> None:
    loads = ("even", "one-empty", "uneven")
    frame = to_frame([ok(of=case(ep_size=2, rank_load=load)) for load in loads])
    assert describe(frame).labels == ["", "one empty rank", "uneven ranks"]
    assert (
        describe(frame[2:]).title()
        == "e4k2d16i32, 8 tokens, float32, forward, uniform routing, swiglu, EP 2, uneven ranks"
    )
    assert describe(frame[:1]).title().endswith("swiglu, EP 2")


def test_headings_stand_alone() -> None:
    of = [case(num_tokens=8), case(num_tokens=16, routing="zipf:1.2", mode="train")]
    headings = describe(to_frame([ok(of=one) for one in of])).headings
    assert headings == ["8 tokens, forward, uniform routing", "16 tokens, train, zipf:1.2 routing"]
    assert describe(to_frame([ok(), ok(of=case(seed=3))])).headings == ["defaults", "seed 3"]
    assert describe(to_frame([ok()])).headings == [""]


def test_the_plain_context_has_its_name_beside_others_only() -> None:
    of = [case(mode="train", context=context) for context in ("plain", "checkpoint")]
    assert describe(to_frame([ok(of=one) for one in of])).headings == ["plain", "checkpoint"]
    assert "plain" not in describe(to_frame([ok(of=of[0])])).title()
    assert describe(to_frame([ok(of=of[1])])).title().endswith("checkpoint")


def test_a_panel_is_titled_with_what_differs_in_its_figure() -> None:
    frame = to_frame([ok(of=case(ep_size=2)), ok(of=case(ep_size=2, rank_load="uneven"))])
    assert panel_title(frame, "train", "uniform", "uneven") == "train, uneven ranks"
    assert panel_title(frame, "train", "uniform", "even") == "train"
    assert panel_title(frame[1:], "train", "uniform", "uneven") == "train"


def test_the_machine_is_named_with_the_date_of_the_run() -> None:
    gpu = {"device": "cuda", "gpu": "NVIDIA H200", "l2": "cold"}
    assert machine(to_frame([ok(run_id="20261123-101500-quick", **gpu)])) == "NVIDIA H200, L2 cold, 2026-11-23"
    assert machine(to_frame([ok(run_id="2026-11-23T1015", device="cpu")])) == "CPU, 2026-11-23"
    assert machine(to_frame([ok(run_id="3f2a")])) == ""


def test_loads_of_the_ranks_stand_together_in_order() -> None:
    of = [case(num_tokens=n, ep_size=2, rank_load=load) for n in (8, 16) for load in ("uneven", "even")]
    ordered = in_case_order(to_frame([ok(of=one) for one in of]))
    assert list(zip(ordered["rank_load"], ordered["num_tokens"], strict=True)) == [
        ("even", 8),
        ("even", 16),
        ("uneven", 8),
        ("uneven", 16),
    ]


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
