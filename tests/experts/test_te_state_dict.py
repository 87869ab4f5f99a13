"""The state dict of GroupedExpertsTE has the stacked layout and torch's semantics."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from experts import BackendConfig, GroupedExperts, GroupedExpertsTE, InputError
from experts.te.layer import CachedWeightsTE
from tests.experts.layers import (
    Named,
    assert_same,
    random_batch,
    random_parameters,
    run_stacked,
)
from tests.experts.oracle import PARAMETERS
from tests.experts.te_layers import check, config, layer

pytestmark = pytest.mark.usefixtures("fake_libraries")


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_state_dict_has_only_the_stacked_layout(activation: str, bias: bool) -> None:
    parameters = random_parameters(config(expert_activation=activation, expert_bias=bias))
    made = layer(parameters, expert_activation=activation, expert_bias=bias)
    state = made.state_dict()
    assert list(state) == [name for name in PARAMETERS if name in parameters]
    assert_same(state, parameters)
    assert not any(tensor.requires_grad for tensor in state.values())


def test_tes_own_parameters_are_one_transposed_matrix_per_expert() -> None:
    parameters = random_parameters(config())
    made = layer(parameters)
    own = {name: p.detach() for name, p in made.named_parameters()}
    assert len(own) == 4 * 12
    for index in range(12):
        assert torch.equal(own[f"gate_up_linear.weight{index}"], parameters["gate_and_up_projs"][index].t())
        assert torch.equal(own[f"down_linear.weight{index}"], parameters["down_projs"][index].t())
        assert torch.equal(own[f"gate_up_linear.bias{index}"], parameters["gate_up_proj_bias"][index])
        assert torch.equal(own[f"down_linear.bias{index}"], parameters["down_proj_bias"][index])
    assert all(p.is_contiguous() and p.is_leaf and p.requires_grad for p in made.parameters())


def test_properties_give_the_stacked_parameters() -> None:
    parameters = random_parameters(config())
    made = layer(parameters)
    assert_same({name: getattr(made, name) for name in PARAMETERS}, parameters)
    made.gate_and_up_projs.square().sum().backward()
    assert torch.equal(made.gate_up_linear.weight11.grad, 2 * parameters["gate_and_up_projs"][11].t())
    without = layer(expert_bias=False)
    assert without.gate_up_proj_bias is without.down_proj_bias is None
    assert without.n_routed_experts == 12


def test_missing_gradients_are_left_out() -> None:
    made = layer()
    assert made.stacked_grads() == {}
    run_stacked(made, random_batch(made.config))
    assert list(made.stacked_grads()) == list(PARAMETERS)


def test_state_dict_takes_prefix_and_destination() -> None:
    destination: Any = {"other": torch.ones(1)}
    given = layer().state_dict(destination=destination, prefix="mlp.experts.")
    assert given is destination
    assert list(given) == ["other", *(f"mlp.experts.{name}" for name in PARAMETERS)]


def test_entries_already_in_a_destination_stay() -> None:
    destination: Any = {"gate_up_proj": torch.ones(1), "head.gate_up_linear.weight0": torch.ones(1)}
    assert list(layer().state_dict(destination=destination)) == [*list(destination)[:2], *PARAMETERS]


def test_layers_inside_a_model_load_only_their_own_keys() -> None:
    """The hooks of a layer change only its own keys, even if the name of another layer begins with the same letters."""
    model = nn.ModuleDict({"a": layer(), "ab": layer(), "c": GroupedExperts(config()), "d": nn.Linear(2, 2)})
    state = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index))
        for index, (name, tensor) in enumerate(model.state_dict().items())
    }
    assert list(state) == [*(f"{key}.{name}" for key in ("a", "ab", "c") for name in PARAMETERS), "d.weight", "d.bias"]
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    assert_same(model.state_dict(), state)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_checkpoints_load_from_the_loop_into_te_and_back(bias: bool) -> None:
    parameters = random_parameters(config(expert_bias=bias), seed=9)
    loop = GroupedExperts(config(expert_bias=bias))
    loop.load_state_dict(layer(parameters, expert_bias=bias).state_dict())
    assert_same(loop.state_dict(), parameters)
    made = layer(expert_bias=bias)
    made.load_state_dict(loop.state_dict())
    check(made, random_batch(made.config, num_tokens=40), parameters)


def test_loading_changes_neither_the_state_dict_nor_the_parameters_identity() -> None:
    made = layer()
    before = dict(made.named_parameters())
    state = random_parameters(made.config, seed=7)
    given = dict(state)
    made.load_state_dict(given)
    assert given.keys() == state.keys()
    assert all(p is before[name] for name, p in made.named_parameters())
    state["down_projs"].zero_()
    assert made.down_projs.any()


def test_assigned_parameters_have_the_strides_that_te_needs() -> None:
    with torch.device("meta"):
        made = GroupedExpertsTE(config())
    assert all(p.is_meta for p in made.parameters())
    parameters = random_parameters(made.config)
    made.load_state_dict(parameters, assign=True)
    check(made, random_batch(made.config), parameters)


@pytest.mark.parametrize("missing", PARAMETERS)
def test_missing_keys_have_their_stacked_names(missing: str) -> None:
    made = layer()
    before = made.state_dict()
    state = {name: tensor for name, tensor in random_parameters(made.config, seed=3).items() if name != missing}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{missing}"\.') as caught:
        made.load_state_dict(state)
    assert "linear" not in str(caught.value)
    result = made.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([missing], [])
    assert_same(made.state_dict(), {**state, missing: before[missing]})


def test_missing_keys_inside_a_model_have_their_stacked_names() -> None:
    model = nn.ModuleDict({"first": layer(), "second": layer(), "norm": nn.LayerNorm(4)})
    result = model.load_state_dict({}, strict=False)
    assert sorted(result.missing_keys) == sorted(
        [*(f"{layer}.{name}" for layer in ("first", "second") for name in PARAMETERS), "norm.weight", "norm.bias"]
    )


def test_unexpected_keys_are_errors_or_reported() -> None:
    """A bias for a layer without biases is not dropped silently, and neither is a parameter in TE's own layout."""
    made = layer(expert_bias=False)
    own = "gate_up_linear.weight12"
    state = {**made.state_dict(), "down_proj_bias": torch.ones(12, 16), own: torch.ones(32, 16), "other": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"down_proj_bias"'):
        made.load_state_dict(state)
    result = made.load_state_dict(state, strict=False)
    assert (result.missing_keys, sorted(result.unexpected_keys)) == ([], sorted(["down_proj_bias", own, "other"]))


@pytest.mark.parametrize("shape", [(12, 16, 16), (11, 16, 32), (13, 16, 32), (16, 32)], ids=str)
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    made = layer()
    state = {**made.state_dict(), "gate_and_up_projs": torch.ones(shape)}
    with pytest.raises(RuntimeError, match=r"size mismatch for gate_and_up_projs: the value has shape"):
        made.load_state_dict(state)


def load_alone(made: GroupedExpertsTE, state: Any, prefix: str = "", strict: bool = True) -> list[Any]:
    """Call the method that loads one module as NeMo AutoModel does, and return the keys and messages it reports."""
    missing, unexpected, mistakes = [], [], []  # type: ignore[var-annotated]
    made._load_from_state_dict(state, prefix, None, strict, missing, unexpected, mistakes)
    return [missing, unexpected, mistakes]


@pytest.mark.parametrize("prefix", ["", "mlp.experts."])
def test_the_layer_alone_loads_its_part_of_a_state_dict(prefix: str) -> None:
    """Both linears are loaded, and the caller's state dict stays as it was."""
    made, parameters = layer(), random_parameters(config(), seed=8)
    state = {prefix + name: tensor for name, tensor in parameters.items()}
    given = dict(state)
    assert load_alone(made, state, prefix) == [[], [], []]
    assert state.items() == given.items()
    assert_same(made.state_dict(), parameters)


@pytest.mark.parametrize("missing", [PARAMETERS, ("down_projs",), ("gate_and_up_projs", "down_proj_bias")], ids=str)
def test_the_layer_alone_reports_what_is_missing(missing: tuple[str, ...]) -> None:
    """What is there is loaded, the rest keeps its values and is reported once, by its stacked name."""
    made, before, parameters = layer(), layer().state_dict(), random_parameters(config(), seed=8)
    state = {name: tensor for name, tensor in parameters.items() if name not in missing}
    assert load_alone(made, state) == [[*missing], [], []]
    assert_same(made.state_dict(), {**parameters, **{name: before[name] for name in missing}})
    assert load_alone(made, {}, strict=False) == [[], [], []]


def test_the_layer_alone_reports_other_shapes_and_unexpected_keys() -> None:
    made, parameters = layer(expert_bias=False), random_parameters(config(), seed=8)
    state = {**parameters, "down_projs": torch.ones(12, 16, 17)}
    missing, unexpected, (mistake,) = load_alone(made, state)
    assert (missing, sorted(unexpected)) == ([], ["down_proj_bias", "gate_up_proj_bias"])
    assert mistake == "size mismatch for down_projs: the value has shape [12, 16, 17], but the layer has [12, 16, 16]"


def test_tes_own_entries_do_not_replace_stacked_entries() -> None:
    """If a state dict has both, the stacked entries count. Own entries alone are loaded as well."""
    made, parameters = layer(), random_parameters(config(), seed=8)
    own = {name: torch.zeros_like(parameter) for name, parameter in made.named_parameters()}
    assert not made.load_state_dict({**own, **parameters}).missing_keys
    assert_same(made.state_dict(), parameters)
    assert not made.load_state_dict(own).missing_keys
    assert not any(tensor.any() for tensor in made.state_dict().values())


def test_properties_can_be_set() -> None:
    """The values are copied into TE's parameters, which stay the same objects. An nn.Parameter is no exception."""
    made, parameters = layer(), random_parameters(config(), seed=8)
    before = dict(made.named_parameters())
    for name, tensor in parameters.items():
        setattr(made, name, nn.Parameter(tensor) if name == "down_projs" else tensor)
    assert all(parameter is before[name] for name, parameter in made.named_parameters())
    check(made, random_batch(made.config), parameters)


def test_properties_refuse_what_does_not_fit() -> None:
    made = layer(expert_bias=False)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.down_proj_bias = None
    with pytest.raises(InputError, match=r"down_proj_bias cannot become \[12, 16\]: this layer has None"):
        made.down_proj_bias = torch.ones(12, 16)
    with pytest.raises(InputError, match=r"down_projs cannot become None: this layer has \[12, 16, 16\]"):
        made.down_projs = None
    with pytest.raises(InputError, match=r"down_projs: the value has shape \[1, 16, 16\], but the layer has \[12, 16"):
        made.down_projs = torch.ones(1, 16, 16)
    assert_same(made.state_dict(), before)


def test_kept_weights_are_quantised_again_after_every_kind_of_load() -> None:
    made = CachedWeightsTE(config(), BackendConfig(te_fp8="block"))
    for seed, load in enumerate((made.load_state_dict, lambda state: load_alone(made, state), partial(set_all, made))):
        parameters = random_parameters(made.config, seed=20 + seed)
        load(parameters)
        check(made, random_batch(made.config), parameters)


def set_all(made: GroupedExpertsTE, parameters: Named) -> None:
    for name, tensor in parameters.items():
        setattr(made, name, tensor)
