"""Values that fit together: each rule refuses what a layer does not admit or what takes long, and says why."""

from dataclasses import replace

import pytest

from moebench.parity.space.rules import fitting, misfits
from moebench.parity.space.trial import AXES, Trial

WIDE = {"dim": 64, "moe_inter_dim": 64}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"dim": 0}, "sizes must be positive"),
        ({"num_tokens": -1}, "sizes must be positive"),
        ({"n_activated_experts": 2}, "cannot choose more experts than there are"),
        ({"n_routed_experts": 3, "ep_size": 2}, "the same number of experts"),
        ({"expert_activation": "swigluoai"}, "need a limit above 0"),
        ({"expert_activation": "relu2", "limit": 7.0}, "have none"),
        ({"alpha": 0.3}, "have an alpha"),
        ({"index_dtype": "int8", "n_routed_experts": 200}, "does not count all experts"),
        ({"index_dtype": "uint8", "n_routed_experts": 257}, "does not count all experts"),
        ({"index_dtype": "uint8", "choices": "some-dropped"}, "uint8 has no -1"),
        ({"dtype": "float16", "x_scale": 60.0}, "float16 overflows"),
        ({"steps": ("repeat",), "wanted": "x"}, "repeat wants all gradients or none"),
        ({"wanted": "biases"}, "the layer has no biases"),
        ({"n_routed_experts": 1024, **WIDE}, "the parameters would have more than 64 MiB"),
        ({"num_tokens": 140_000}, "there would be more than 131074 rows"),
        ({"num_tokens": 65_537, "n_routed_experts": 1024}, "pairs of a token and an expert"),
        ({"steps": ("repeat",), "num_tokens": 67}, "repeat takes at most 66 rows"),
        ({"steps": ("call",) * 3, "n_routed_experts": 101}, "called at most twice"),
        ({"num_tokens": 601, "dim": 64}, "have dims of at most 33"),
    ],
)
def test_what_does_not_fit_is_said_with_its_values(fields, problem):
    said = list(misfits(replace(Trial(), **fields)))
    assert any(problem in one for one in said), said
    name = next(iter(fields))
    assert any(f"{name} = {fields[name]}" in one for one in said)


def test_the_simplest_trial_fits():
    """test_search.py has random trials that fit."""
    assert not list(misfits(Trial()))


def test_fitting_leaves_out_the_values_that_a_rule_refuses():
    assert fitting({"n_routed_experts": 3}, "n_activated_experts", (1, 3, 4, "all")) == [1, 3, "all"]
    assert fitting({"n_routed_experts": 200}, "index_dtype", AXES["index_dtype"]) == [
        "int64",
        "int32",
        "int16",
        "uint8",
    ]
    assert fitting({"expert_activation": "geglu"}, "limit", (0.0, 7.0)) == [0.0]


def test_a_rule_of_several_axes_holds_once_all_of_them_are_known():
    assert fitting({"dim": 64}, "n_routed_experts", (1, 1024)) == [1, 1024]
    assert fitting(WIDE, "n_routed_experts", (1, 1024)) == [1]
