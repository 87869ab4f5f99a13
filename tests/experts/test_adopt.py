"""Layers take the configurations of NeMo AutoModel, and refuse other objects with one sentence."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experts import (
    BackendConfig,
    ConfigError,
    GroupedExperts,
    GroupedExpertsDeepEP,
    GroupedExpertsTE,
    InputError,
    MoEConfig,
    get_expert_activation_for_deepep,
)
from experts.adopt import backend_config, moe_config
from tests.experts.layers import assert_same, random_batch, random_parameters, run_stacked
from tests.experts.layers import moe_config as small

EACH_CLASS = pytest.mark.parametrize("layer", [GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE])


@dataclass(kw_only=True)
class TheirMoEConfig:
    """Has fields of NeMo AutoModel's MoEConfig (0.7): those of the experts, and some of the router."""

    n_routed_experts: int = 4
    n_shared_experts: int = 0
    n_activated_experts: int = 2
    score_func: str = "softmax"
    dim: int = 16
    inter_dim: int = 64
    moe_inter_dim: int = 8
    norm_topk_prob: bool = False
    expert_bias: bool = True
    expert_activation: str = "quick_geglu"
    apply_router_weight_after_down: bool = False
    activation_alpha: float = 1.5
    activation_limit: float = 0.7
    swiglu_limit: float = 0.0
    dtype: str | torch.dtype = torch.float32
    moe_latent_size: int | None = None

    @property
    def expert_dim(self) -> int:
        return self.dim if self.moe_latent_size is None else self.moe_latent_size


@dataclass(kw_only=True)
class TheirBackendConfig:
    """Has fields of NeMo AutoModel's BackendConfig (0.7). `te_fp8` is an object with a recipe."""

    attn: str = "sdpa"
    linear: str = "torch"
    experts: str = "torch"
    dispatcher: str = "torch"
    dispatcher_num_sms: int = 20
    te_fp8: Any = None
    cuda_graph: Any = field(default_factory=SimpleNamespace)


OURS = small(expert_bias=True, expert_activation="quick_geglu", activation_alpha=1.5, activation_limit=0.7)


def test_a_config_of_automodel_has_the_fields_of_ours() -> None:
    assert moe_config(TheirMoEConfig()) == OURS
    assert moe_config(TheirMoEConfig(dtype="bfloat16")).dtype is torch.bfloat16
    assert moe_config(TheirMoEConfig(moe_latent_size=12)) == dataclasses.replace(OURS, dim=12)
    assert moe_config(OURS) is OURS


def test_what_a_config_leaves_out_has_our_default() -> None:
    given = SimpleNamespace(n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8)
    assert moe_config(given) == MoEConfig(**vars(given))


@pytest.mark.parametrize(
    ("fields", "right"),
    [
        ({}, BackendConfig(experts="loop", dispatcher="allgather")),
        ({"experts": "torch_mm"}, BackendConfig(experts="torch_mm", dispatcher="allgather")),
        (
            {"experts": "te", "dispatcher": "deepep", "dispatcher_num_sms": 24},
            BackendConfig(experts="te", dispatcher="deepep", num_sms=24),
        ),
        ({"te_fp8": SimpleNamespace(recipe="block")}, BackendConfig(experts="loop", dispatcher="allgather")),
        ({"te_fp8": "block"}, BackendConfig(experts="loop", dispatcher="allgather", te_fp8="block")),
    ],
)
def test_a_backend_of_automodel_has_the_fields_of_ours(fields: dict[str, Any], right: BackendConfig) -> None:
    assert backend_config(TheirBackendConfig(**fields)) == right


def test_our_backend_stays_as_it_is() -> None:
    ours = BackendConfig(experts="torch_mm", save="time")
    assert backend_config(ours) is ours
    assert backend_config(None) == BackendConfig()


def test_a_layer_made_from_automodels_configs_computes() -> None:
    parameters, batch = random_parameters(OURS), random_batch(OURS)
    layers = (
        GroupedExperts(TheirMoEConfig(), TheirBackendConfig(experts="torch_mm")),  # type: ignore[arg-type]
        GroupedExperts(OURS, BackendConfig(experts="torch_mm")),
    )
    for made in layers:
        made.load_state_dict(parameters)
    theirs, ours = (run_stacked(made, batch) for made in layers)
    assert_same(theirs, ours)
    assert layers[0].n_routed_experts == 4
    assert layers[0].dispatcher_name == "allgather"


@pytest.mark.usefixtures("fake_libraries")
def test_te_takes_automodels_configs() -> None:
    backend: Any = TheirBackendConfig(experts="te", dispatcher="deepep", te_fp8=SimpleNamespace(recipe="block"))
    made = GroupedExpertsTE(TheirMoEConfig(), backend)  # type: ignore[arg-type]
    assert (made.config, made.dispatcher_name, made.te_fp8) == (OURS, "deepep", None)
    assert made.dispatcher_options == {"num_sms": 20}


def test_the_activation_takes_automodels_config() -> None:
    x, probs = torch.randn(3, 16), torch.rand(3)
    theirs: Any = TheirMoEConfig()
    assert torch.equal(
        get_expert_activation_for_deepep(theirs)(x, probs), get_expert_activation_for_deepep(OURS)(x, probs)
    )
    unknown: Any = TheirMoEConfig(expert_activation="gelu")
    with pytest.raises(ConfigError, match=r"MoEConfig.expert_activation = 'gelu': "):
        get_expert_activation_for_deepep(unknown)


@EACH_CLASS
@pytest.mark.parametrize("given", [{"dim": 16}, None, "qwen", SimpleNamespace(dim=16, moe_inter_dim=8)], ids=str)
@pytest.mark.usefixtures("fake_libraries")
def test_another_object_is_no_config(layer: Any, given: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        layer(given)
    lacking = "n_routed_experts, n_activated_experts" + ("" if hasattr(given, "dim") else ", dim, moe_inter_dim")
    assert str(caught.value) == (
        f"a {type(given).__name__} is no MoEConfig: it has no {lacking}; pass an experts.MoEConfig, or an object with "
        "its fields, such as NeMo AutoModel's"
    )


@EACH_CLASS
@pytest.mark.parametrize("given", ["torch_mm", {"experts": "te"}, SimpleNamespace(experts=None)], ids=str)
@pytest.mark.usefixtures("fake_libraries")
def test_another_object_is_no_backend(layer: Any, given: Any) -> None:
    lacking = "dispatcher" if hasattr(given, "experts") else "experts, dispatcher"
    with pytest.raises(ConfigError, match=f"^a {type(given).__name__} is no BackendConfig: it has no {lacking}; pass "):
        layer(OURS, given)


@pytest.mark.parametrize("name", ["hybridep", "uccl_ep", "mok"])
def test_dispatchers_that_only_automodel_has_are_refused(name: str) -> None:
    backend: Any = TheirBackendConfig(dispatcher=name)
    with pytest.raises(ConfigError, match=f"^BackendConfig.dispatcher = '{name}': .*give the name of a dispatcher"):
        GroupedExperts(OURS, backend)


def test_torch_is_another_name_of_allgather() -> None:
    assert BackendConfig(dispatcher="torch") == BackendConfig(dispatcher="allgather")  # type: ignore[arg-type]


PAGE = (Path(__file__).parents[2] / "docs/automodel.md").read_text()


@EACH_CLASS
@pytest.mark.usefixtures("fake_libraries")
def test_the_page_lists_the_attributes_that_our_layers_have_and_have_not(layer: Any) -> None:
    made = layer(OURS)
    lacking = PAGE.split("```text\n")[1].split("```")[0].split()
    assert len(lacking) > 10
    assert [name for name in lacking if hasattr(made, name)] == []
    ours = re.findall(r"`(\w+)`", PAGE.split("They have ")[1].split(". AutoModel's")[0])
    assert len(ours) == 10
    assert [name for name in ours if not hasattr(made, name)] == []


def test_the_page_is_right_about_calls() -> None:
    made, batch = GroupedExperts(OURS), random_batch(OURS)
    made.load_state_dict(random_parameters(OURS))
    with pytest.raises(InputError, match=r"must have shape \[tokens, n_activated_experts\]"):
        made(batch.x, batch.token_mask, batch.weights[:, :1], batch.indices[:, :1])
    with pytest.raises(InputError, match=r"indices run from \d to 4, but must be from -1 \(no expert\) to 3"):
        made(batch.x, batch.token_mask, batch.weights, batch.indices.masked_fill(batch.indices == 3, 4))


@pytest.mark.usefixtures("fake_libraries")
def test_the_page_is_right_about_engines() -> None:
    backend: Any = TheirBackendConfig()
    assert GroupedExpertsDeepEP(OURS, backend).engine_name == "loop"
    backend.experts = "te"
    with pytest.raises(ConfigError, match="GroupedExperts cannot use the engine 'te'"):
        GroupedExperts(OURS, backend)
    backend.experts, backend.dispatcher = "torch_mm", "deepep"
    with pytest.raises(ConfigError, match="GroupedExpertsTE computes with te, not 'torch_mm'"):
        GroupedExpertsTE(OURS, backend)
    assert GroupedExperts(OURS, backend).dispatcher_name == "deepep"
