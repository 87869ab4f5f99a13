"""State dicts of GroupedExperts: the stacked layout with torch's semantics. Any engine loads those of any other."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from experts import BackendConfig, GroupedExperts
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

PLAIN = ["gate_and_up_projs", "down_projs"]
WITH_BIAS = [*PLAIN, "gate_up_proj_bias", "down_proj_bias"]


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
def test_a_layer_inside_a_model_loads_the_models_state_dict(engine: str) -> None:
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
def test_assigning_uses_the_given_tensors_as_parameters(engine: str) -> None:
    with torch.device("meta"):
        made = GroupedExperts(moe_config(expert_bias=True), BackendConfig(experts=engine))
    state = random_parameters(made.config, seed=14)
    made.load_state_dict(state, assign=True)
    assert all(getattr(made, name).data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in made.parameters())
    run(made, random_batch(made.config))


@pytest.mark.parametrize("missing", WITH_BIAS)
@on_every_engine
def test_a_missing_key_is_an_error_or_reported(engine: str, missing: str) -> None:
    made = layer(engine, moe_config(expert_bias=True))
    state = made.state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        made.load_state_dict(state)
    result = made.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([missing], [])


@on_every_engine
def test_an_unexpected_key_is_an_error_or_reported(engine: str) -> None:
    """A bias for a layer without biases is not dropped silently."""
    made = layer(engine, moe_config())
    state = {**made.state_dict(), "down_proj_bias": torch.ones(4, 16)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"down_proj_bias"'):
        made.load_state_dict(state)
    result = made.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["down_proj_bias"])
    assert made.down_proj_bias is None


@on_every_engine
def test_another_shape_is_refused(engine: str) -> None:
    made = layer(engine, moe_config())
    state = {**made.state_dict(), "down_projs": torch.ones(4, 16, 8)}
    with pytest.raises(RuntimeError, match="size mismatch for down_projs"):
        made.load_state_dict(state)
