"""The bytes of weights and of Adam's state follow from the shape."""

import pytest

from moebench.workload.case import Case
from moebench.workload.weights import adam_bytes, num_weights, weight_bytes

SHAPE = {"num_tokens": 1, "n_routed_experts": 8, "n_activated_experts": 2, "dim": 10, "moe_inter_dim": 3}


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
    assert num_weights(Case(**SHAPE, **more)) == number


@pytest.mark.parametrize(("dtype", "size", "adam"), [("bfloat16", 2, 12), ("float32", 4, 8), ("float64", 8, 8)])
def test_adam_keeps_a_copy_only_of_weights_narrower_than_float32(dtype: str, size: int, adam: int) -> None:
    case = Case(**SHAPE, dtype=dtype)
    assert (weight_bytes(case), adam_bytes(case)) == (720 * size, 720 * adam)
