"""MoEConfig and BackendConfig: which values they accept, and the one-line errors for the others."""

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch

from experts import BackendConfig, ConfigError, ExpertsError, MoEConfig, is_gated_activation
from experts.config import DTYPES

SIZES = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 32}


def config(**changes: Any) -> MoEConfig:
    return MoEConfig(**{**SIZES, **changes})


def refusal(build: Any, **fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**fields)
    return str(caught.value)


def test_defaults_are_those_of_nemo_automodel() -> None:
    assert dataclasses.asdict(config()) == {
        **SIZES,
        "expert_bias": False,
        "expert_activation": "swiglu",
        "activation_alpha": 1.702,
        "activation_limit": 7.0,
        "swiglu_limit": 0.0,
        "apply_router_weight_after_down": False,
        "dtype": torch.bfloat16,
    }
    assert dataclasses.asdict(BackendConfig()) == {
        "experts": None,
        "dispatcher": None,
        "te_fp8": None,
        "save": None,
        "fp8_gradients": None,
        "fp8_weight_gradients": None,
        "fp8_rows": None,
        "gradient_accumulation_fusion": False,
        "max_tokens_per_rank": None,
        "capacity_factor": None,
        "equal_tokens": None,
        "num_sms": None,
    }


NOT_AN_INTEGER = (0, -1, True, 1.0, "16", None, [1], math.nan)
NOT_A_BOOL = (1, 0, "yes", None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, value) for field in SIZES for value in NOT_AN_INTEGER],
        *[(field, value) for field in ("expert_bias", "apply_router_weight_after_down") for value in NOT_A_BOOL],
        *[("expert_activation", value) for value in ("relu", "SwiGLU", "", None, 1)],
        *[("activation_alpha", value) for value in (math.nan, math.inf, "1.7", None, True)],
        *[("activation_limit", value) for value in (0.0, -7.0, math.nan, "7", None, True)],
        *[("swiglu_limit", value) for value in (-1.0, math.nan, "7", None, False)],
        *[("dtype", value) for value in ("fp8", "torch.float32", "", None, 32, torch.int8, torch.float8_e4m3fn, [1])],
    ],
    ids=repr,
)
def test_the_error_for_a_wrong_value_is_one_line_with_field_value_rule_and_remedy(field: str, value: object) -> None:
    message = refusal(config, **{field: value})
    assert "\n" not in message
    assert message.startswith(f"MoEConfig.{field}")
    assert repr(value) in message
    rule, _, remedy = message.removeprefix(f"MoEConfig.{field}").partition("; give ")
    assert rule
    assert remedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("experts", value) for value in ("cuda", "Loop", "", 3, ["loop"], True)],
        *[("max_tokens_per_rank", value) for value in (0, -1, 1.5, "16", True)],
        *[("capacity_factor", value) for value in (0.0, -1.0, math.nan, math.inf, "1.25", True)],
        *[("equal_tokens", value) for value in (1, "yes")],
        *[("num_sms", value) for value in (0, -2, 7, 20.0, "20", True)],
        *[("dispatcher", value) for value in ("local", "nccl", 3)],
        *[("te_fp8", value) for value in ("e4m3", True, "")],
    ],
    ids=repr,
)
def test_the_error_for_a_wrong_backend_is_one_line_that_lists_the_names(field: str, value: object) -> None:
    message = refusal(BackendConfig, **{field: value})
    assert "\n" not in message
    assert message.startswith(f"BackendConfig.{field} = {value!r}: ")
    some_names = {"experts": "'loop', 'torch_mm'", "dispatcher": "'allgather'", "te_fp8": "'current', 'delayed'"}
    some_names |= {"max_tokens_per_rank": "e.g. 4096", "capacity_factor": "e.g. 1.25"}
    some_names |= {"equal_tokens": "e.g. True", "num_sms": "a positive even integer, or None for the default 20"}
    assert some_names[field] in message
    assert "; give " in message


def test_errors_list_the_names_of_activations_and_dtypes() -> None:
    message = refusal(config, expert_activation="relu")
    assert all(name in message for name in ("'swiglu'", "'swigluoai'", "'quick_geglu'", "'geglu'", "'relu2'"))
    assert "float64, float32, bfloat16, float16" in refusal(config, dtype="fp8")


def test_more_activated_than_routed_experts_are_refused() -> None:
    message = refusal(config, n_activated_experts=9)
    assert "\n" not in message
    assert "n_activated_experts = 9 exceeds n_routed_experts = 8" in message
    assert "lower n_activated_experts" in message
    assert config(n_activated_experts=8).n_activated_experts == 8


def test_every_mistake_has_its_own_line() -> None:
    lines = refusal(config, dim=0, expert_bias="no", dtype="fp8").splitlines()
    assert [line.split(maxsplit=1)[0].rstrip(":") for line in lines] == [
        "MoEConfig.dim",
        "MoEConfig.expert_bias",
        "MoEConfig.dtype",
    ]


def test_the_error_for_a_missing_field_names_it() -> None:
    message = refusal(MoEConfig, **{name: size for name, size in SIZES.items() if name != "dim"})
    assert message == "MoEConfig.dim is missing: give the hidden size of a token, a positive integer, e.g. 2048"


@pytest.mark.parametrize("build", [config, BackendConfig])
def test_the_error_for_an_unknown_field_lists_the_fields(build: Any) -> None:
    message = refusal(build, expert=8)
    assert "\n" not in message
    assert "there is no field 'expert'" in message
    assert all(field.name in message for field in dataclasses.fields(build()))


def test_config_error_is_a_value_error_and_an_experts_error() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, ExpertsError)


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_may_be_given_by_name(name: str) -> None:
    dtype = getattr(torch, name)
    assert config(dtype=name).dtype is dtype
    assert config(dtype=name) == config(dtype=dtype)


def test_torch_is_another_name_of_the_loop() -> None:
    assert BackendConfig(experts="torch") == BackendConfig(experts="loop")
    assert BackendConfig(experts="torch").experts == "loop"


@pytest.mark.parametrize("name", ["loop", "torch_mm", "torch_mm_mxfp8", "triton", "gmm", "te", None])
def test_a_backend_config_keeps_the_name_of_every_engine(name: Any) -> None:
    assert BackendConfig(experts=name).experts == name


def test_integers_are_accepted_as_floats() -> None:
    assert config(activation_limit=7, swiglu_limit=10) == config(activation_limit=7.0, swiglu_limit=10.0)


@pytest.mark.parametrize("made", [config(), BackendConfig()], ids=["MoEConfig", "BackendConfig"])
def test_configs_cannot_be_changed(made: Any) -> None:
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, getattr(made, field.name))


def test_fields_must_be_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        MoEConfig(8, 2, 16, 32)
    with pytest.raises(TypeError, match="positional"):
        BackendConfig("loop")


def test_replace_validates_again() -> None:
    assert dataclasses.replace(config(), dim=32) == config(dim=32)
    assert dataclasses.replace(config(), dtype="float16").dtype is torch.float16
    assert dataclasses.replace(BackendConfig(), experts="torch").experts == "loop"
    with pytest.raises(ConfigError, match=r"MoEConfig\.dim = 0"):
        dataclasses.replace(config(), dim=0)


def test_with_dtype_changes_only_the_dtype() -> None:
    one = config(dtype="float32", expert_bias=True, swiglu_limit=1.0)
    assert one.with_dtype(torch.bfloat16) == dataclasses.replace(one, dtype="bfloat16")
    assert one.with_dtype(torch.float32) == one


def test_configs_hash_compare_pickle_and_copy_as_values() -> None:
    assert hash(config()) == hash(config())
    assert config() != config(dim=32)
    assert pickle.loads(pickle.dumps(config())) == config()
    assert copy.deepcopy(config()) == config()


def test_only_relu2_is_ungated() -> None:
    gated = {name: is_gated_activation(name) for name in ("swiglu", "swigluoai", "quick_geglu", "geglu", "relu2")}
    assert gated == {"swiglu": True, "swigluoai": True, "quick_geglu": True, "geglu": True, "relu2": False}
