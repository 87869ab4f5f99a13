"""GroupedExperts as a module: parameters, init_weights, state dicts, and inputs that do not fit."""

import copy
from collections import OrderedDict
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
    InputError,
    MoEConfig,
    RegistryError,
)
from tests.experts.layers import (
    BF16,
    F32,
    assert_same,
    layer,
    moe_config,
    on_every_engine,
    random_batch,
    random_parameters,
    run,
)

CPU = torch.device("cpu")
PLAIN = ["gate_and_up_projs", "down_projs"]
WITH_BIAS = [*PLAIN, "gate_up_proj_bias", "down_proj_bias"]


@pytest.mark.parametrize(("activation", "up"), [("swiglu", 12), ("quick_geglu", 12), ("relu2", 6)])
@on_every_engine
def test_stacked_parameters(engine: str, activation: str, up: int) -> None:
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
def test_without_bias_they_are_none(engine: str) -> None:
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


def test_an_engine_that_is_not_here_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts.engines, "_MODULES", {"loop": "experts.compute.loop"})
    with pytest.raises(RegistryError, match="there is no engine 'torch_mm' here; the engines are loop"):
        GroupedExperts(moe_config(), BackendConfig(experts="torch_mm"))


NO_TE = "{} has no engine 'te', which keeps weights of its own; use GroupedExpertsTE"
NO_RECIPE = (
    "te_fp8 = 'block' is Transformer Engine's, {} would compute without it; use GroupedExpertsTE, or leave te_fp8 out"
)


@pytest.mark.parametrize("layer", [GroupedExperts, GroupedExpertsDeepEP])
@pytest.mark.parametrize(
    ("fields", "message"),
    [({"experts": "te"}, NO_TE), ({"te_fp8": "block"}, NO_RECIPE), ({"experts": "loop", "te_fp8": "block"}, NO_RECIPE)],
    ids=["te", "recipe", "loop-recipe"],
)
def test_what_is_transformer_engines_is_refused_and_not_ignored(layer: Any, fields: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layer(moe_config(), BackendConfig(**fields))
    assert str(caught.value) == message.format(layer.__name__)


def test_the_defaults_of_each_module() -> None:
    made = [GroupedExperts(moe_config()), GroupedExpertsDeepEP(moe_config())]
    assert [(m.engine_name, m.dispatcher_name) for m in made] == [("loop", "allgather"), ("gmm", "deepep")]
    backend = BackendConfig(experts="torch_mm", dispatcher="alltoall")
    made = [GroupedExperts(moe_config(), backend), GroupedExpertsDeepEP(moe_config(), backend)]
    assert {(m.engine_name, m.dispatcher_name) for m in made} == {("torch_mm", "alltoall")}


# init_weights


@pytest.mark.parametrize(("arguments", "std"), [((), 0.02), ((0.5,), 0.5)], ids=["default", "given"])
@on_every_engine
def test_init_weights(engine: str, arguments: tuple[float, ...], std: float) -> None:
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


# state dicts


def keys(bias: bool) -> list[str]:
    return WITH_BIAS if bias else PLAIN


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@on_every_engine
def test_state_dict_is_the_stacked_layout(engine: str, bias: bool) -> None:
    made = layer(engine, moe_config(expert_bias=bias))
    state = made.state_dict()
    assert list(state) == keys(bias)
    assert all(state[name].data_ptr() == getattr(made, name).data_ptr() for name in state)
    assert not any(tensor.requires_grad for tensor in state.values())
    assert all(tensor is getattr(made, name) for name, tensor in made.state_dict(keep_vars=True).items())


@on_every_engine
def test_state_dict_takes_prefix_and_destination(engine: str) -> None:
    made = layer(engine, moe_config(expert_bias=True))
    destination: Any = OrderedDict(other=torch.ones(1))
    given = made.state_dict(destination=destination, prefix="mlp.experts.")
    assert given is destination
    assert list(given) == ["other", *(f"mlp.experts.{name}" for name in WITH_BIAS)]


@on_every_engine
def test_inside_another_module(engine: str) -> None:
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": layer(engine, moe_config(expert_bias=True))})})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert list(state) == [f"mlp.experts.{name}" for name in WITH_BIAS]
    for parameter in model.parameters():
        parameter.detach().zero_()
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    assert_same(model.state_dict(), state)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize(("source", "target"), [("loop", "torch_mm"), ("torch_mm", "loop")])
def test_a_checkpoint_of_one_engine_loads_into_the_other(source: str, target: str, activation: str, bias: bool) -> None:
    config = moe_config(expert_bias=bias, expert_activation=activation)
    first = layer(source, config, random_parameters(config, seed=11))
    second = layer(target, config, random_parameters(config, seed=12))
    assert not second.load_state_dict(first.state_dict()).missing_keys
    assert_same(second.state_dict(), first.state_dict())
    batch = random_batch(config)
    one, other = run(first, batch), run(second, batch)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-5)


@on_every_engine
def test_loading_copies_into_the_same_parameters(engine: str) -> None:
    made = layer(engine, moe_config(expert_bias=True))
    before = dict(made.named_parameters())
    state = random_parameters(made.config, seed=13)
    made.load_state_dict(state)
    assert all(parameter is before[name] for name, parameter in made.named_parameters())
    state["down_projs"].zero_()
    assert made.down_projs.any()


@on_every_engine
def test_loading_keeps_the_dtype(engine: str) -> None:
    made = layer(engine, moe_config(dtype=BF16))
    state = random_parameters(moe_config(dtype=F32), seed=13)
    made.load_state_dict(state)
    assert {p.dtype for p in made.parameters()} == {BF16}
    assert torch.equal(made.down_projs, state["down_projs"].to(BF16))


@on_every_engine
def test_assigning_takes_the_tensors_themselves(engine: str) -> None:
    with torch.device("meta"):
        made = GroupedExperts(moe_config(expert_bias=True), BackendConfig(experts=engine))
    state = random_parameters(made.config, seed=14)
    made.load_state_dict(state, assign=True)
    assert all(getattr(made, name).data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in made.parameters())
    run(made, random_batch(made.config))


@pytest.mark.parametrize("missing", WITH_BIAS)
@on_every_engine
def test_missing_key(engine: str, missing: str) -> None:
    made = layer(engine, moe_config(expert_bias=True))
    state = made.state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        made.load_state_dict(state)
    result = made.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([missing], [])


@on_every_engine
def test_unexpected_key(engine: str) -> None:
    """A bias for a layer that has none is not dropped in silence."""
    made = layer(engine, moe_config())
    state = {**made.state_dict(), "down_proj_bias": torch.ones(4, 16)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"down_proj_bias"'):
        made.load_state_dict(state)
    result = made.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["down_proj_bias"])
    assert made.down_proj_bias is None


@on_every_engine
def test_other_shape(engine: str) -> None:
    made = layer(engine, moe_config())
    state = {**made.state_dict(), "down_projs": torch.ones(4, 16, 8)}
    with pytest.raises(RuntimeError, match="size mismatch for down_projs"):
        made.load_state_dict(state)


@on_every_engine
def test_deepcopy_is_equal_and_apart(engine: str) -> None:
    made = layer(engine, moe_config(expert_bias=True))
    batch = random_batch(made.config)
    other = copy.deepcopy(made)
    first = run(made, batch)
    assert_same(run(other, batch), first)
    assert other.engine_name == engine
    made.down_projs.detach().zero_()
    assert other.down_projs.any()


@on_every_engine
def test_module_moved_to_another_dtype(engine: str) -> None:
    made = layer(engine, moe_config(expert_bias=True)).to(BF16)
    batch = random_batch(moe_config(dtype=BF16))
    assert {tensor.dtype for name, tensor in run(made, batch).items() if name != "weights"} == {BF16}


# inputs that do not fit


WRONG_INPUTS = {
    "x-batch": ({"x": (1, 7, 16)}, "x has shape [1, 7, 16], needs [tokens, dim = 16]"),
    "x-dim": ({"x": (7, 8)}, "x has shape [7, 8], needs [tokens, dim = 16]"),
    "x-flat": ({"x": (16,)}, "x has shape [16], needs [tokens, dim = 16]"),
    "x-tokens": ({"x": (6, 16)}, "need shape [tokens, n_activated_experts] = [6, 2]"),
    "x-int": ({"x": torch.int64}, "x is torch.int64, needs one of float64, float32, bfloat16, float16"),
    "x-float8": ({"x": torch.float8_e4m3fn}, "x is torch.float8_e4m3fn, needs one of"),
    "mask-tokens": ({"token_mask": (6,)}, "token_mask is torch.bool [6], needs bool [tokens] = [7]"),
    "mask-2d": ({"token_mask": (7, 1)}, "token_mask is torch.bool [7, 1], needs bool [tokens] = [7]"),
    "mask-int": ({"token_mask": torch.int64}, "token_mask is torch.int64 [7], needs bool"),
    "weights-tokens": ({"weights": (6, 2)}, "weights [6, 2] and indices [7, 2] need shape"),
    "weights-choices": ({"weights": (7, 1)}, "n_activated_experts] = [7, 2]"),
    "weights-flat": ({"weights": (14,)}, "weights [14] and indices [7, 2] need shape"),
    "weights-int": ({"weights": torch.int64}, "weights (torch.int64) floats"),
    "indices-choices": ({"indices": (7, 3)}, "weights [7, 2] and indices [7, 3] need shape"),
    "indices-tokens": ({"indices": (8, 2)}, "weights [7, 2] and indices [8, 2] need shape"),
    "indices-float": ({"indices": torch.float32}, "indices (torch.float32) must be integers"),
    "indices-bool": ({"indices": torch.bool}, "indices (torch.bool) must be integers"),
    "indices-complex": ({"indices": torch.complex64}, "indices (torch.complex64) must be integers"),
}


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
@on_every_engine
def test_input_that_does_not_fit_is_one_line(engine: str, wrong: str) -> None:
    changes, message = WRONG_INPUTS[wrong]
    made = layer(engine, moe_config())
    batch = random_batch(made.config)
    for name, change in changes.items():
        tensor = getattr(batch, name)
        tensor = tensor.to(change) if isinstance(change, torch.dtype) else torch.ones(change, dtype=tensor.dtype)
        batch = batch.with_(**{name: tensor})
    with pytest.raises(InputError) as caught:
        made(batch.x, batch.token_mask, batch.weights, batch.indices)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert not isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(("index", "span"), [(4, "0 to 4"), (-2, "-2 to 3"), (1 << 40, "0 to 1099511627776")])
@on_every_engine
def test_index_out_of_range(engine: str, index: int, span: str) -> None:
    made = layer(engine, moe_config())
    batch = random_batch(made.config, num_tokens=20)
    batch.indices[11, 1] = index
    with pytest.raises(InputError) as caught:
        made(batch.x, batch.token_mask, batch.weights, batch.indices)
    assert str(caught.value) == (f"indices run from {span}, need -1 (no expert) to 3 (n_routed_experts - 1)")
