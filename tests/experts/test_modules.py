"""GroupedExperts as a module: parameters, defaults, init_weights, copies."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import experts.engines
from experts import (
    BackendConfig,
    ConfigError,
    GroupedExperts,
    GroupedExpertsDeepEP,
    MoEConfig,
    RegistryError,
)
from tests.experts.layers import (
    BF16,
    assert_same,
    layer,
    moe_config,
    on_every_engine,
    random_batch,
    run,
)

CPU = torch.device("cpu")
PLAIN = ["gate_and_up_projs", "down_projs"]


@pytest.mark.parametrize(("activation", "up"), [("swiglu", 12), ("quick_geglu", 12), ("relu2", 6)])
@on_every_engine
def test_parameters_have_the_stacked_shapes(engine: str, activation: str, up: int) -> None:
    config = MoEConfig(
        n_routed_experts=3,
        n_activated_experts=2,
        dim=8,
        moe_inter_dim=6 if engine == "loop" else 8,
        expert_activation=activation,
        expert_bias=True,
    )
    inter = config.moe_inter_dim
    up = up * inter // 6
    made = GroupedExperts(config, BackendConfig(experts=engine))
    assert {name: tuple(p.shape) for name, p in made.named_parameters()} == {
        "gate_and_up_projs": (3, 8, up),
        "down_projs": (3, inter, 8),
        "gate_up_proj_bias": (3, up),
        "down_proj_bias": (3, 8),
    }
    assert {p.dtype for p in made.parameters()} == {BF16}
    assert all(p.requires_grad and p.is_leaf for p in made.parameters())
    assert made.n_routed_experts == 3


@on_every_engine
def test_without_bias_the_bias_parameters_are_none(engine: str) -> None:
    made = layer(engine, moe_config())
    assert made.gate_up_proj_bias is None
    assert made.down_proj_bias is None
    assert [name for name, _ in made.named_parameters()] == PLAIN


def test_the_loop_is_the_default() -> None:
    config = moe_config()
    for backend in (None, BackendConfig(), BackendConfig(experts="torch"), BackendConfig(experts="loop")):
        assert GroupedExperts(config, backend).engine_name == "loop"
    assert GroupedExperts(config, BackendConfig(experts="torch_mm")).engine_name == "torch_mm"
    assert "engine=torch_mm" in repr(GroupedExperts(config, BackendConfig(experts="torch_mm")))


def test_an_unknown_engine_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts.engines, "_MODULES", {"loop": "experts.compute.loop"})
    with pytest.raises(RegistryError, match="there is no engine 'torch_mm' here; the engines are loop"):
        GroupedExperts(moe_config(), BackendConfig(experts="torch_mm"))


NO_TE = "{} cannot use the engine 'te', which keeps its own weights; use GroupedExpertsTE"
NO_RECIPE = (
    "te_fp8 = 'block' needs Transformer Engine, which {} does not use; use GroupedExpertsTE, or leave te_fp8 out"
)


@pytest.mark.parametrize("layer", [GroupedExperts, GroupedExpertsDeepEP])
@pytest.mark.parametrize(
    ("fields", "message"),
    [({"experts": "te"}, NO_TE), ({"te_fp8": "block"}, NO_RECIPE), ({"experts": "loop", "te_fp8": "block"}, NO_RECIPE)],
    ids=["te", "recipe", "loop-recipe"],
)
def test_options_of_transformer_engine_are_refused_and_not_ignored(layer: Any, fields: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layer(moe_config(), BackendConfig(**fields))
    assert str(caught.value) == message.format(layer.__name__)


def test_each_module_has_its_default_engine_and_dispatcher() -> None:
    made = [GroupedExperts(moe_config()), GroupedExpertsDeepEP(moe_config())]
    assert [(m.engine_name, m.dispatcher_name) for m in made] == [("loop", "allgather"), ("gmm", "deepep")]
    backend = BackendConfig(experts="torch_mm", dispatcher="alltoall")
    made = [GroupedExperts(moe_config(), backend), GroupedExpertsDeepEP(moe_config(), backend)]
    assert {(m.engine_name, m.dispatcher_name) for m in made} == {("torch_mm", "alltoall")}


@pytest.mark.parametrize(("arguments", "std"), [((), 0.02), ((0.5,), 0.5)], ids=["default", "given"])
@on_every_engine
def test_init_weights_gives_normal_weights_and_zero_biases(
    engine: str, arguments: tuple[float, ...], std: float
) -> None:
    made = layer(engine, moe_config(dim=64, moe_inter_dim=64, expert_bias=True))
    before = dict(made.named_parameters())
    torch.manual_seed(0)
    made.init_weights(CPU, *arguments)
    for name in PLAIN:
        parameter = getattr(made, name)
        assert parameter is before[name]
        for expert in parameter:
            assert expert.std().item() == pytest.approx(std, rel=0.06)
            assert abs(expert.mean().item()) < 0.06 * std
            assert (expert / std).abs().max().item() > 3
    assert not made.gate_up_proj_bias.any()
    assert not made.down_proj_bias.any()
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in made.parameters())


def test_init_weights_follows_the_seed_and_not_the_engine() -> None:
    made = []
    for engine in ("loop", "torch_mm", "loop"):
        torch.manual_seed(7)
        made.append(layer(engine, moe_config()))
        made[-1].init_weights(buffer_device=CPU, init_std=0.02)
    assert_same(made[0].state_dict(), made[1].state_dict())
    assert_same(made[0].state_dict(), made[2].state_dict())


@on_every_engine
def test_parameters_on_the_meta_device_become_real(engine: str) -> None:
    with torch.device("meta"):
        made = GroupedExperts(moe_config(expert_bias=True), BackendConfig(experts=engine))
    assert all(p.is_meta for p in made.parameters())
    made.init_weights(CPU)
    assert {p.device for p in made.parameters()} == {CPU}
    assert isinstance(made.down_projs, nn.Parameter)
    run(made, random_batch(made.config))


@on_every_engine
def test_a_deepcopy_is_equal_and_has_its_own_parameters(engine: str) -> None:
    made = layer(engine, moe_config(expert_bias=True))
    batch = random_batch(made.config)
    other = copy.deepcopy(made)
    first = run(made, batch)
    assert_same(run(other, batch), first)
    assert other.engine_name == engine
    made.down_projs.detach().zero_()
    assert other.down_projs.any()


@on_every_engine
def test_a_module_can_be_moved_to_another_dtype(engine: str) -> None:
    made = layer(engine, moe_config(expert_bias=True)).to(BF16)
    batch = random_batch(moe_config(dtype=BF16))
    assert {tensor.dtype for name, tensor in run(made, batch).items() if name != "weights"} == {BF16}
