"""GroupedExpertsTE with a fake of Transformer Engine that has the assertions of the real one, but not its kernels."""

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from experts import BackendConfig, ConfigError, GroupedExpertsTE, Unsupported
from experts.registry import get_backend
from experts.steps import Permutation
from experts.te import library
from tests.experts import fake_transformer_engine, fakes
from tests.experts.layers import (
    BF16,
    F16,
    F32,
    F64,
    random_batch,
    random_parameters,
)
from tests.experts.oracle import PARAMETERS
from tests.experts.te_layers import calls, check, config, layer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RECIPES = {"current": "Float8CurrentScaling", "delayed": "DelayedScaling", "block": "Float8BlockScaling"}

pytestmark = pytest.mark.usefixtures("fake_libraries")


# results


@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "swigluoai", "quick_geglu", "geglu", "relu2"])
def test_output_and_every_gradient(activation: str, bias: bool, after: bool) -> None:
    """Some experts have no token, one token has no expert, and one token chose an expert twice."""
    made = layer(expert_activation=activation, expert_bias=bias, apply_router_weight_after_down=after)
    check(made, random_batch(made.config, indices=[[11, 0], [0, 0], [2, 10], [-1, -1], [-1, 2], [3, 2]]))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_results_have_the_dtype_of_the_config(dtype: torch.dtype) -> None:
    made = layer(dtype=dtype)
    found = check(made, random_batch(made.config, num_tokens=30))
    assert {tensor.dtype for name, tensor in found.items() if name != "weights"} == {dtype}


@pytest.mark.parametrize("why", ["no tokens", "masked", "index"])
def test_without_rows_the_library_is_not_called(why: str) -> None:
    """Every gradient is zeros and not missing, also if masked rows hold NaN."""
    made = layer()
    batch = random_batch(made.config, num_tokens=0 if why == "no tokens" else 5)
    if why == "masked":
        nan = torch.full_like(batch.x, torch.nan)
        batch = batch.with_(token_mask=torch.zeros_like(batch.token_mask), x=nan, grad=nan)
    if why == "index":
        batch = batch.with_(indices=torch.full_like(batch.indices, -1))
    assert not any(tensor.any() for tensor in check(made, batch).values())
    assert calls(made) == []


def test_values_of_masked_rows_change_nothing() -> None:
    made = layer()
    batch = random_batch(made.config)
    batch.token_mask[[0, 3, 6]] = False
    for tensor in (batch.x, batch.weights, batch.grad):
        tensor[~batch.token_mask] = torch.nan
    check(made, batch)


def test_tensors_of_any_strides_are_made_contiguous_for_the_library() -> None:
    made = layer()
    batch = random_batch(made.config)
    wide = torch.stack([batch.x, batch.x], dim=-1)[..., 0]
    check(made, batch.with_(x=wide, grad=torch.ones(()).expand(batch.grad.shape)))


def test_group_sizes_are_in_the_order_of_the_experts() -> None:
    made = layer(n_activated_experts=1)
    check(made, random_batch(made.config, indices=[10, 2, 10, 0, -1, 10, 2, 11]))
    assert [call.m_splits for call in calls(made)] == [[1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 1]]


# sizes on the device


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let TE multiply groups whose sizes are on the device, as with a new cuBLASLt."""
    monkeypatch.setattr(fake_transformer_engine.Gpu, "multiplies_groups", True)
    library.takes_sizes_on_device.cache_clear()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_sizes_stay_on_the_device(dtype: torch.dtype, bias: bool, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host never asks for the number of rows, and rows past the last group change nothing."""
    made = layer(dtype=dtype, expert_bias=bias, apply_router_weight_after_down=after)
    monkeypatch.setattr(Permutation, "cut", lambda *_: pytest.fail("the number of rows is known on the host"))
    check(made, random_batch(made.config, indices=[[11, 0], [0, 0], [2, 10], [-1, -1], [-1, 2], [3, 2]]))
    assert [call.sizes_on_device for call in calls(made)] == [True]
    nobody = random_batch(made.config, indices=[[-1, -1]] * 3)
    assert not any(tensor.any() for tensor in check(made, nobody).values())
    assert not any(tensor.any() for tensor in check(made, random_batch(made.config, num_tokens=0)).values())
    assert [sum(call.m_splits) for call in calls(made)] == [9, 0], "without tokens the library is not called"


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("fields", "recipe"),
    [
        ({"dtype": F32}, None),
        ({"dtype": BF16}, "current"),
        ({"dtype": BF16, "dim": 12}, None),
        ({"dtype": BF16, "moe_inter_dim": 20}, None),
        ({"dtype": BF16, "n_routed_experts": 65}, None),
    ],
    ids=["float32", "fp8", "dim", "inter", "65-experts"],
)
def test_what_the_native_path_refuses_gets_sizes_on_the_host(fields: dict, recipe: Any) -> None:
    made = layer(te_fp8=recipe, **fields)
    check(made, random_batch(made.config))
    assert [call.sizes_on_device for call in calls(made)] == [False]


@pytest.mark.usefixtures("native")
def test_a_surrounding_autocast_gets_sizes_on_the_host_for_its_calls_only() -> None:
    made = layer(dtype=BF16, n_routed_experts=64)
    batch = random_batch(made.config)
    check(made, batch)
    with fake_transformer_engine.autocast(recipe=fake_transformer_engine.Recipe("Float8BlockScaling")):
        check(made, batch)
    check(made, batch)
    assert [call.sizes_on_device for call in calls(made)] == [True, False, True]


@pytest.mark.usefixtures("native")
def test_ranks_leave_out_other_ranks_rows_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(dtype=BF16)
    assert made.takes_sizes_on_device(BF16)
    monkeypatch.setattr(made, "ep_mesh", SimpleNamespace(size=lambda: 2))
    assert not made.takes_sizes_on_device(BF16)


def test_an_older_library_gets_sizes_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = sys.modules["transformer_engine.pytorch.module.grouped_linear"]
    monkeypatch.delattr(linears, "is_module_grouped_tensor_path_supported")
    made = layer(dtype=BF16)
    check(made, random_batch(made.config))
    assert [call.sizes_on_device for call in calls(made)] == [False]


# FP8


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_pads_every_group(recipe: str) -> None:
    made = layer(te_fp8=recipe, n_activated_experts=1)
    check(made, random_batch(made.config, indices=[0] * 17 + [5] * 16 + [11] * 3))
    sizes = [32, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 16]
    assert calls(made) == [fake_transformer_engine.Call(sizes, RECIPES[recipe], None)]
    assert not fake_transformer_engine.FP8GlobalStateManager.is_fp8_enabled()


def test_groups_that_need_no_padding_stay_as_they_are() -> None:
    made = layer(te_fp8="current", n_activated_experts=1)
    check(made, random_batch(made.config, indices=[3] * 16 + [4] * 32))
    assert calls(made)[0].m_splits == [0, 0, 0, 16, 32, *[0] * 7]


def test_mxfp8_pads_to_32() -> None:
    made = layer(te_fp8="mxfp8", n_activated_experts=1, dim=32, moe_inter_dim=32)
    made._unsupported = lambda *_: None  # an SM90 has no MXFP8
    check(made, random_batch(made.config, indices=[1] * 17 + [2]))
    assert calls(made)[0].m_splits == [0, 32, 32, *[0] * 9]


def test_the_recipe_of_a_surrounding_autocast_is_used() -> None:
    made = layer()
    batch = random_batch(made.config)
    with fake_transformer_engine.autocast(recipe=fake_transformer_engine.Recipe("Float8BlockScaling")):
        check(made, batch)
        with fake_transformer_engine.autocast(enabled=False):
            check(made, batch)
    check(made, batch)
    assert [call.recipe for call in calls(made)] == ["Float8BlockScaling", None, None]
    assert [any(size % 16 for size in call.m_splits) for call in calls(made)] == [False, True, True]


def test_the_layers_own_recipe_overrides_a_surrounding_autocast() -> None:
    made = layer(te_fp8="current")
    with fake_transformer_engine.autocast(recipe=fake_transformer_engine.Recipe("DelayedScaling")):
        check(made, random_batch(made.config))
    assert calls(made)[0].recipe == "Float8CurrentScaling"


def test_quantised_weights_are_kept_while_is_first_microbatch_is_false() -> None:
    """With False, the library uses the old quantised weights even after a load. This shows that it gets the flag."""
    made = layer(te_fp8="current", expert_bias=False)
    batch = random_batch(made.config)

    def forward(is_first_microbatch: bool | None) -> torch.Tensor:
        return made(batch.x, batch.token_mask, batch.weights, batch.indices, is_first_microbatch)

    old = forward(True)
    parameters = random_parameters(made.config, seed=5)
    made.load_state_dict(parameters)
    assert torch.equal(forward(False), old)
    check(made, batch, parameters)
    assert torch.equal(forward(False), old)
    new = forward(True)
    assert not torch.equal(new, old)
    assert torch.equal(forward(False), new)
    assert [call.is_first_microbatch for call in calls(made)] == [True, False, None, False, True, False]


@pytest.mark.parametrize("name", ["te_fp8_current_cached", "te_fp8_block_cached"])
def test_cached_weights_are_quantised_once_and_again_after_a_load(name: str) -> None:
    made = get_backend(name).build(config())
    made.load_state_dict(random_parameters(made.config))
    batch = random_batch(made.config)
    for _ in range(3):
        check(made, batch)
    other = random_parameters(made.config, seed=5)
    made.load_state_dict(other)
    for _ in range(2):
        check(made, batch, other)
    assert [call.is_first_microbatch for call in calls(made)] == [True, False, False, True, False]
    assert {call.recipe for call in calls(made)} == {RECIPES[get_backend(name).fp8]}


def test_cached_weights_are_quantised_again_after_a_reset() -> None:
    made = get_backend("te_fp8_current_cached").build(config())
    batch = random_batch(made.config)
    for _ in range(2):
        made.init_weights(CPU)
        check(made, batch, {name: tensor.clone() for name, tensor in made.state_dict().items()})


def test_cached_weights_are_quantised_again_after_a_load_of_the_model() -> None:
    made = get_backend("te_fp8_current_cached").build(config())
    model = nn.ModuleDict({"mlp": made})
    batch = random_batch(made.config)
    for seed in (1, 2):
        parameters = random_parameters(made.config, seed)
        model.load_state_dict({f"mlp.{name}": tensor for name, tensor in parameters.items()})
        check(made, batch, parameters)


def test_a_copy_has_its_own_parameters() -> None:
    made = layer()
    other = copy.deepcopy(made)
    batch = random_batch(made.config)
    check(other, batch)
    made.load_state_dict(random_parameters(made.config, seed=8))
    check(other, batch)
    assert list(other.state_dict()) == list(PARAMETERS)


# building


@pytest.mark.parametrize("build", [lambda made: made, copy.deepcopy], ids=["made", "meta"])
def test_init_weights_is_tes_own_reset(build: Callable[[nn.Module], nn.Module]) -> None:
    """TE sets normal weights with a standard deviation of 0.023 and zero biases. It ignores `init_std`."""
    torch.manual_seed(0)
    with torch.device("cpu" if build is not copy.deepcopy else "meta"):
        made = GroupedExpertsTE(config(dim=64, moe_inter_dim=64))
    made.init_weights(CPU, init_std=1.0)
    assert {p.device for p in made.parameters()} == {CPU}
    for index in range(12):
        for matrices in (made.gate_and_up_projs, made.down_projs):
            assert matrices[index].std().item() == pytest.approx(0.023, rel=0.06)
    assert not made.gate_up_proj_bias.any()
    assert not made.down_proj_bias.any()
    assert not torch.equal(made.down_projs[0], made.down_projs[1])
    made.load_state_dict(random_parameters(made.config))
    check(made, random_batch(made.config))


def test_the_engine_is_te_and_the_default_dispatcher_is_deepep() -> None:
    made = GroupedExpertsTE(config())
    assert (made.engine_name, made.dispatcher_name) == ("te", "deepep")
    assert GroupedExpertsTE(config(), BackendConfig(experts="te", dispatcher="alltoall")).dispatcher_name == "alltoall"
    assert "engine=te" in repr(made)
    for name in ("loop", "torch_mm", "gmm"):
        with pytest.raises(ConfigError, match=f"GroupedExpertsTE computes with te, not '{name}'; use GroupedExperts"):
            GroupedExpertsTE(config(), BackendConfig(experts=name))


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.remove(monkeypatch)
    with pytest.raises(Unsupported, match=r"^transformer_engine does not import .*; with nvcc: .*'moebench\[te\]'"):
        GroupedExpertsTE(config())


REFUSALS = [
    ({}, None, (7, 0), None),
    ({}, None, (6, 1), "te needs SM70, this is SM61"),
    ({}, "block", (8, 0), "block needs SM89, this is SM80"),
    ({}, "block", (8, 9), None),
    ({"dim": 32, "moe_inter_dim": 32}, "mxfp8", (9, 0), "mxfp8 needs SM100, this is SM90"),
    ({"dim": 32, "moe_inter_dim": 32}, "mxfp8", (10, 0), None),
    ({"moe_inter_dim": 48}, "mxfp8", (10, 0), "FP8 takes multiples of 32, but dim = 16; use te without FP8"),
    ({"moe_inter_dim": 24}, "current", (9, 0), "FP8 takes multiples of 16, but moe_inter_dim = 24; use te without FP8"),
    ({"moe_inter_dim": 24}, None, (9, 0), None),
    ({"dtype": F64}, None, (9, 0), "Transformer Engine does not compute float64; use the loop"),
]


@pytest.mark.parametrize(("fields", "recipe", "capability", "reason"), REFUSALS)
def test_unsupported_and_forward_give_the_same_reason(
    fields: dict, recipe: Any, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`unsupported` gives the reason before a layer is made. A layer can be made anywhere; its forward then refuses."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    given = library.unsupported(CUDA, config(**fields), recipe)
    assert (given and given.reason) == reason
    made = layer(te_fp8=recipe, **fields)
    batch = random_batch(made.config)
    if reason is None:
        check(made, batch)
        return
    with pytest.raises(Unsupported) as caught:
        made(batch.x, batch.token_mask, batch.weights, batch.indices)
    assert str(caught.value) == f"te: {reason}"


def test_float32_activations_need_float32_parameters() -> None:
    made = layer(dtype=BF16)
    batch = random_batch(config())
    with pytest.raises(Unsupported, match="te: Transformer Engine computes float32 with float32 parameters, these are"):
        made(batch.x, batch.token_mask, batch.weights, batch.indices)
