"""A trial's text says what differs from the simplest trial. test_search.py reads the texts of random trials."""

import dataclasses

import pytest

from moebench.errors import UsageError
from moebench.parity.space.trial import AXES, RANK_AXES, Trial, of_row


def test_the_text_has_what_differs():
    assert Trial().text == "num_tokens=1"
    trial = Trial(steps=("call:no_grad",), num_tokens=3, expert_bias=True, limit=0.75, dtype="bfloat16", seed=7)
    assert trial.text == "steps=call:no_grad num_tokens=3 dtype=bfloat16 limit=0.75 expert_bias=True seed=7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_token=3", "'num_token=3' is not a field with a value"),
        ("num_tokens", "write NAME=VALUE"),
        ("num_tokens=many", "num_tokens = many must be an integer"),
        ("expert_bias=yes", "expert_bias = yes must be True or False"),
        ("dtype=float8", "dtype = float8 must be one of float32, float64"),
        ("routing=zip", "routing = zip must be one of uniform"),
        ("steps=call,backwards", "the steps are call, "),
    ],
)
def test_a_wrong_text_is_one_line_that_says_what_is_right(text, message):
    with pytest.raises(UsageError) as error:
        Trial.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert f"--case {text!r}" in str(error.value)


def test_the_default_of_every_field_is_the_simplest_value_of_its_axis():
    names = {field.name for field in dataclasses.fields(Trial)}
    assert {*AXES, "seed"} == names
    for name, values in AXES.items():
        assert values[0] == getattr(Trial(), name), name
        assert len(set(values)) == len(values)
    assert RANK_AXES.keys() <= AXES.keys()


def test_the_case_has_the_limit_of_its_activation():
    assert Trial(expert_activation="swiglu", limit=0.75).case.swiglu_limit == 0.75
    one = Trial(expert_activation="quick_geglu", limit=0.75, alpha=0.3).case
    assert (one.activation_limit, one.activation_alpha, one.swiglu_limit) == (0.75, 0.3, 0.0)
    assert (Trial(param_dtype="bfloat16").params, Trial(dtype="float16").params) == ("bfloat16", "float16")


def test_all_choices_are_as_many_as_there_are_experts():
    trial = of_row({"n_routed_experts": 11, "n_activated_experts": "all", "num_tokens": 3})
    assert (trial.n_activated_experts, trial.num_rows) == (11, 33)
