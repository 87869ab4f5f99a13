"""Case and Job: which values they refuse, what an id depends on, and which work counts as useful."""

from typing import Any

import pytest
from pydantic import ValidationError

from moebench.workload.case import (
    ACTIVATIONS,
    DTYPES,
    UNGATED,
    Case,
    Job,
    adam_bytes,
    key_of,
    num_weights,
    weight_bytes,
)
from moebench.workload.models import MODELS


def case(**changes: Any) -> Case:
    fields = {"num_tokens": 8, "n_routed_experts": 4, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 32}
    return Case(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tokens": -1},
        {"num_tokens": "8"},
        {"num_tokens": True},
        {"num_tokens": 2**31},
        {"dim": 2**31},
        {"n_routed_experts": 0},
        {"dim": 16.0},
        {"dtype": "fp8"},
        {"expert_activation": "relu"},
        {"mode": "backward"},
        {"masked_share": 1.5},
        {"swiglu_limit": -1.0},
        {"activation_limit": 0.0},
        {"seed": 2**31},
        {"ep_size": 0},
        {"rank_load": "empty"},
        {"num_token": 8},
    ],
)
def test_wrong_field_is_refused_and_named(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        case(**changes)
    assert [error["loc"][0] for error in caught.value.errors()] == list(changes)


@pytest.mark.parametrize(
    "routing",
    [
        "uniform",
        "balanced",
        "one-hot",
        "zipf",
        "zipf:1",
        "zipf:1.25",
        "empty",
        "empty:0.5",
        "empty:.5",
        "trace:a b.npy",
    ],
)
def test_routing_is_taken(routing: str) -> None:
    assert case(routing=routing).routing == routing


@pytest.mark.parametrize(
    "routing", ["", "Uniform", "uniform:2", "zipf:", "zipf:-1", "zipf:1.", "empty:1", "empty:1.5", "onehot", "trace:"]
)
def test_routing_is_refused(routing: str) -> None:
    with pytest.raises(ValidationError, match="routing"):
        case(routing=routing)


def test_both_disagreements_between_fields_are_said_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        case(n_routed_experts=6, n_activated_experts=8, ep_size=4)
    assert "n_activated_experts = 8 exceeds n_routed_experts = 6" in str(caught.value)
    assert "n_routed_experts = 6 does not divide by ep_size = 4" in str(caught.value)


@pytest.mark.parametrize("rank_load", ["uneven", "one-empty"])
def test_ranks_can_only_differ_where_there_are_ranks(rank_load: str) -> None:
    with pytest.raises(ValidationError, match=f"rank_load = {rank_load} needs several ranks, but ep_size = 1"):
        case(rank_load=rank_load)
    assert case(rank_load=rank_load, ep_size=2).rank_load == rank_load


def test_all_experts_may_be_activated() -> None:
    assert case(n_activated_experts=4).n_activated_experts == 4


def test_case_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        case().dim = 32


def test_case_id_does_not_depend_on_fields_left_at_their_default() -> None:
    """A later field with a default must not change old ids: the digest covers only values that differ from defaults."""
    assert case().case_id == case(dtype="bfloat16", routing="uniform", seed=0).case_id
    assert case().case_id == "e4k2d16i32-t8-bfloat16-forward-uniform-ep1-6eaafc5e"


def test_case_id_tells_every_field_apart() -> None:
    others = {
        "num_tokens": 9,
        "n_routed_experts": 8,
        "n_activated_experts": 1,
        "dim": 32,
        "moe_inter_dim": 16,
        "mode": "train",
        "dtype": "float32",
        "model": "olmoe",
        "expert_activation": "geglu",
        "expert_bias": True,
        "activation_alpha": 1.0,
        "activation_limit": 6.0,
        "swiglu_limit": 1.0,
        "apply_router_weight_after_down": True,
        "routing": "zipf:1.5",
        "masked_share": 0.5,
        "ep_size": 2,
        "rank_load": "uneven",
        "context": "compile",
        "dp_size": 2,
        "subject": "block:olmoe",
        "seed": 1,
    }
    assert others.keys() == Case.model_fields.keys()
    needed = {"rank_load": {"ep_size": 2}, "dp_size": {"context": "fsdp2"}}
    ids = {case().case_id, *(case(**needed.get(name, {}), **{name: value}).case_id for name, value in others.items())}
    assert len(ids) == len(others) + 1
    assert case(ep_size=2, rank_load="one-empty").case_id not in ids


def test_flops_follow_the_convention() -> None:
    forward = 6 * 8 * 2 * 16 * 32
    assert case().flops() == forward
    assert case(mode="train").flops() == 3 * forward
    assert case(expert_activation="relu2").flops() == forward * 4 / 6


def test_masked_tokens_do_no_useful_work() -> None:
    assert case(masked_share=0.25).num_active_tokens == 6
    assert case(masked_share=0.25).flops() == case().flops() * 6 / 8
    assert case(masked_share=1.0).flops() == 0
    assert case(num_tokens=0).flops() == 0


@pytest.mark.parametrize(
    ("rank_load", "tokens"), [("even", [10, 10, 10, 10]), ("uneven", [3, 5, 8, 10]), ("one-empty", [10, 10, 10, 0])]
)
def test_the_load_says_how_many_tokens_each_rank_has(rank_load: str, tokens: list[int]) -> None:
    of = case(num_tokens=10, ep_size=4, rank_load=rank_load)
    assert [of.tokens_of_rank(rank) for rank in range(4)] == tokens
    assert of.num_active_tokens == sum(tokens) / 4
    assert of.flops() == 6 * sum(tokens) / 4 * 2 * 16 * 32, "useful work is the mean over ranks"


def test_uneven_ranks_round_up_and_the_last_has_all() -> None:
    of = case(num_tokens=1, ep_size=4, rank_load="uneven")
    assert [of.tokens_of_rank(rank) for rank in range(4)] == [1, 1, 1, 1]
    assert [case(num_tokens=0, ep_size=4, rank_load="uneven").tokens_of_rank(rank) for rank in range(4)] == [0] * 4


def test_the_mask_drops_its_share_on_every_rank() -> None:
    of = case(num_tokens=8, ep_size=2, rank_load="uneven", masked_share=0.25)
    assert [of.active_tokens_of_rank(rank) for rank in range(2)] == [3, 6]
    assert of.num_active_tokens == 4.5


def test_only_relu2_is_ungated() -> None:
    assert [name for name in ACTIVATIONS if not case(expert_activation=name).is_gated] == list(UNGATED) == ["relu2"]


@pytest.mark.parametrize("name", MODELS)
def test_model_preset_makes_a_case(name: str) -> None:
    made = Case.model_validate({"model": name, "num_tokens": 1, **MODELS[name]})
    assert made.case_id.startswith(f"{name}-t1-")


def test_every_dtype_makes_a_case() -> None:
    assert [case(dtype=dtype).dtype for dtype in DTYPES] == list(DTYPES)


def test_job_key_tells_backends_and_dispatchers_apart() -> None:
    jobs = [
        Job(case=case(), backend="loop"),
        Job(case=case(), backend="torch_mm"),
        Job(case=case(), backend="loop", dispatcher="alltoall"),
        Job(case=case(seed=1), backend="loop"),
        Job(case=case(), backend="loop", check="layouts"),
    ]
    assert len({job.key for job in jobs}) == len(jobs)
    assert jobs[0].key == (case().case_id, "loop", "local", None)


def test_a_row_has_the_key_of_its_job() -> None:
    job = Job(case=case(ep_size=2), backend="te", dispatcher="deepep")
    row = {**case().model_dump(), "backend": "te", "dispatcher": "deepep", "case_id": job.case.case_id, "time_ms": 1.0}
    assert key_of(row) == job.key
    assert (key_of(row).case_id, key_of(row).dispatcher) == (job.case.case_id, "deepep")


WEIGHED = {"num_tokens": 1, "n_routed_experts": 8, "n_activated_experts": 2, "dim": 10, "moe_inter_dim": 3}


@pytest.mark.parametrize(
    ("more", "number"),
    [
        ({}, 8 * (10 * 6 + 3 * 10)),
        ({"expert_activation": "relu2"}, 8 * (10 * 3 + 3 * 10)),
        ({"expert_bias": True}, 8 * (10 * 6 + 3 * 10 + 6 + 10)),
        ({"ep_size": 4}, 2 * (10 * 6 + 3 * 10)),
    ],
)
def test_a_rank_has_the_weights_of_its_experts(more: dict, number: int) -> None:
    assert num_weights(Case(**WEIGHED, **more)) == number


@pytest.mark.parametrize(("dtype", "size", "adam"), [("bfloat16", 2, 12), ("float32", 4, 8), ("float64", 8, 8)])
def test_adam_keeps_a_copy_only_of_weights_narrower_than_float32(dtype: str, size: int, adam: int) -> None:
    case = Case(**WEIGHED, dtype=dtype)
    assert (weight_bytes(case), adam_bytes(case)) == (720 * size, 720 * adam)
