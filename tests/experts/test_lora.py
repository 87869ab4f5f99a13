"""Low-rank adapters beside frozen weights: what they add, what they train, what they cost, and how they are merged."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from experts import BackendConfig, ConfigError, GroupedExperts, GroupedExpertsLoRA, InputError, MoEConfig
from experts.lora.layer import ADAPTER_NAMES, adapter_shapes
from experts.lora.peft import from_peft, to_peft
from moebench.measure import memory
from tests.experts.layers import (
    BF16,
    F16,
    F32,
    F64,
    INTERPRETED,
    Batch,
    Named,
    assert_near,
    assert_same,
    expected,
    moe_config,
    random_batch,
    random_parameters,
    run_stacked,
    some_masked,
    takes,
)

CPU = torch.device("cpu")
ALPHA = 5.0
PAIRS = {"gate_and_up_projs": ADAPTER_NAMES[:2], "down_projs": ADAPTER_NAMES[2:]}
INDICES = [[3, 0], [0, 0], [2, 3], [-1, -1], [-1, 2], [0, 2]]  # nobody chooses expert 1
SETUPS = [(engine, dtype) for engine in ("loop", "torch_mm", "triton") for dtype in (F64, F32, F16, BF16)]
on_every_setup = pytest.mark.parametrize(
    ("engine", "dtype"), [one for one in SETUPS if takes(one[0], "cpu", one[1])], ids=lambda part: str(part)
)
on_every_engine = pytest.mark.parametrize("engine", ["loop", "torch_mm"])


def drawn(config: MoEConfig, rank: int) -> Named:
    """Return weights and adapters. B is not zero, so that every adapter changes the result."""
    generator = torch.Generator().manual_seed(5)
    adapters = {
        name: torch.randn(shape, generator=generator, dtype=F64) / math.sqrt(shape[1])
        for name, shape in adapter_shapes(config, rank).items()
    }
    return random_parameters(config) | {name: tensor.to(config.dtype) for name, tensor in adapters.items()}


def layer(engine: str, config: MoEConfig, rank: int = 3, **options: Any) -> GroupedExpertsLoRA:
    made = GroupedExpertsLoRA(config, BackendConfig(experts=engine), rank, ALPHA, **options)
    made.load_state_dict(drawn(config, rank))
    return made


def right(config: MoEConfig, parameters: Named, batch: Batch) -> Named:
    """Return what weight + scale · A @ B gives: the oracle's gradients of it, and from them those of the adapters."""
    exact = {name: tensor.to(F64) for name, tensor in parameters.items()}
    scale = ALPHA / exact["lora_down_A"].shape[2]
    weights = {name: tensor for name, tensor in exact.items() if name not in ADAPTER_NAMES}
    for projection, (name_A, name_B) in PAIRS.items():
        weights[projection] = weights[projection] + scale * torch.bmm(exact[name_A], exact[name_B])
    wide = batch.with_(x=batch.x.to(F64), grad=batch.grad.to(F64))
    found = expected(config.with_dtype(F64), weights, wide)
    adapters = {}
    for projection, (name_A, name_B) in PAIRS.items():
        grad = found[projection]
        adapters[name_A] = scale * torch.bmm(grad, exact[name_B].mT)
        adapters[name_B] = scale * torch.bmm(exact[name_A].mT, grad)
    return {name: found[name] for name in ("output", "x", "weights")} | adapters


# what adapters add


@on_every_setup
@pytest.mark.parametrize("rank", [3, 16])
def test_adapters_add_scale_times_a_b_to_the_weights(engine: str, dtype: torch.dtype, rank: int) -> None:
    """A rank of 3 is filled up with zeros where rows must have a multiple of 16 bytes."""
    config = moe_config(dtype=dtype, dim=16, moe_inter_dim=16, expert_bias=True)
    batch = some_masked(random_batch(config, indices=INDICES))
    assert_near(run_stacked(layer(engine, config, rank), batch), right(config, drawn(config, rank), batch), dtype)


ACTIVATIONS = ("swiglu", "swigluoai", "quick_geglu", "geglu", "relu2")
FIELDS = [(name, False, True) for name in ACTIVATIONS] + [("swiglu", True, True), ("quick_geglu", True, False)]


@pytest.mark.parametrize(("activation", "after", "bias"), FIELDS)
@pytest.mark.parametrize(
    ("engine", "dtype"), [("loop", F64), ("torch_mm", F32), *([("triton", F16)] if INTERPRETED else [])]
)
def test_with_every_activation_and_place_of_the_routing_weight(
    engine: str, dtype: torch.dtype, activation: str, after: bool, bias: bool
) -> None:
    fields = {"expert_activation": activation, "apply_router_weight_after_down": after, "expert_bias": bias}
    config = moe_config(dtype=dtype, moe_inter_dim=16, activation_limit=1.5, swiglu_limit=1.5, **fields)
    batch = random_batch(config, indices=INDICES)
    assert_near(run_stacked(layer(engine, config), batch), right(config, drawn(config, 3), batch), dtype)


@on_every_engine
def test_a_new_adapter_changes_nothing_and_learns(engine: str) -> None:
    """B is zero: the output is that of the weights alone, A gets a gradient of zero, and B gets another one."""
    config = moe_config(expert_bias=True)
    made = GroupedExpertsLoRA(config, BackendConfig(experts=engine), rank=4, alpha=8.0)
    made.load_state_dict(random_parameters(config), strict=False)
    whole = GroupedExperts(config, BackendConfig(experts=engine))
    whole.load_state_dict(random_parameters(config))
    batch = random_batch(config)
    found, alone = run_stacked(made, batch), run_stacked(whole, batch)
    assert torch.equal(found["output"], alone["output"])
    assert_near({name: found[name] for name in ("x", "weights")}, {name: alone[name] for name in ("x", "weights")}, F32)
    for name_A, name_B in PAIRS.values():
        assert not found[name_A].any()
        assert found[name_B].flatten(1).any(dim=1).all()


def test_a_is_drawn_as_peft_draws_it_and_b_is_zero() -> None:
    """kaiming_uniform_(a=√5) of a matrix [rank, in] is uniform within ±1/√in."""
    config = moe_config(n_routed_experts=8, dim=64, moe_inter_dim=32)
    with torch.device("meta"):
        made = GroupedExpertsLoRA(config, rank=8, alpha=1.0)
    made.init_weights(CPU, init_std=0.5)
    for name, rows in (("lora_gate_and_up_A", 64), ("lora_down_A", 32)):
        values = getattr(made, name).detach()
        assert values.abs().max() <= 1 / math.sqrt(rows)
        assert values.std() == pytest.approx(1 / math.sqrt(3 * rows), rel=0.1)
        assert len(values.flatten(1).unique(dim=0)) == 8
    assert not made.lora_gate_and_up_B.any()
    assert not made.lora_down_B.any()
    assert made.gate_and_up_projs.std().item() == pytest.approx(0.5, rel=0.1)


# frozen weights


class MatrixShapes(TorchDispatchMode):
    """Records the last two dimensions of every result of an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = func.is_view or func.overloadpacket in (torch.ops.aten.detach,)
        if isinstance(result, Tensor) and not is_view:
            self.found.add(tuple(result.shape[-2:]))
        return result


@on_every_engine
def test_no_gradient_of_a_frozen_weight_is_computed(engine: str) -> None:
    config = moe_config(dim=24, moe_inter_dim=40, expert_bias=True)
    batch, made = random_batch(config), layer(engine, config, rank=4)
    with MatrixShapes() as shapes:
        found = run_stacked(made, batch)
    assert found.keys() == {"output", "x", "weights", *ADAPTER_NAMES}
    frozen = {(24, 80), (80, 24), (40, 24), (24, 40)}
    assert not shapes.found & frozen
    assert {(24, 4), (4, 80)} <= shapes.found, "the gradients of adapters are computed"
    whole = GroupedExperts(config, BackendConfig(experts=engine))
    whole.load_state_dict(random_parameters(config))
    with MatrixShapes() as shapes:
        run_stacked(whole, batch)
    assert shapes.found & frozen, "the test sees gradients of weights that are trained"


def test_saved_bytes_are_those_of_trained_weights_and_the_thin_product() -> None:
    """With the tokens and weights, forward keeps the up projection, rows @ A, and 24 bytes of maps per row."""
    config = moe_config(dim=64, moe_inter_dim=48)
    batch, made = random_batch(config, num_tokens=100), layer("torch_mm", config, rank=8)
    x, weights = batch.x.requires_grad_(), batch.weights.requires_grad_()
    found = memory.measure_memory(
        lambda: made(x, batch.token_mask, weights, batch.indices), lambda output: output.backward(batch.grad), CPU
    )
    rows, maps = 100 * config.n_activated_experts, config.n_routed_experts * 4
    assert found.saved_bytes == rows * (2 * config.moe_inter_dim + 8) * 4 + rows * 24 + maps


@on_every_engine
def test_weights_that_are_not_frozen_are_refused(engine: str) -> None:
    made, batch = layer(engine, moe_config()), random_batch(moe_config())
    made.down_projs.requires_grad_(True)
    with pytest.raises(ConfigError) as caught:
        run_stacked(made, batch)
    assert str(caught.value) == (
        "down_projs requires a gradient, but the weights beside adapters are frozen; call "
        "down_projs.requires_grad_(False), or train a GroupedExperts"
    )


# backward


@on_every_engine
def test_hooks_checkpoints_and_a_second_backward_give_the_same_bits(engine: str) -> None:
    config = moe_config(expert_bias=True)
    batch, made = random_batch(config, indices=INDICES), layer(engine, config)
    alone = run_stacked(made, batch)

    def gradients(output: Tensor, x: Tensor, weights: Tensor, again: bool = False) -> Named:
        wanted = {"x": x, "weights": weights, **{name: getattr(made, name) for name in ADAPTER_NAMES}}
        grads = torch.autograd.grad(output, list(wanted.values()), batch.grad, retain_graph=again)
        return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}

    def inputs() -> tuple[Tensor, Tensor]:
        return batch.x.clone().requires_grad_(), batch.weights.clone().requires_grad_()

    x, weights = inputs()
    output = made(x, batch.token_mask, weights, batch.indices)
    assert_same(gradients(output, x, weights, again=True), alone)
    assert_same(gradients(output, x, weights), alone)
    x, weights = inputs()
    with saved_tensors_hooks(lambda saved: saved.clone(), lambda saved: saved):
        output = made(x, batch.token_mask, weights, batch.indices)
    assert_same(gradients(output, x, weights, again=True), alone)
    assert_same(gradients(output, x, weights), alone)
    x, weights = inputs()
    output = checkpoint(made, x, batch.token_mask, weights, batch.indices, use_reentrant=False)
    assert_same(gradients(output, x, weights), alone)


@on_every_engine
@pytest.mark.parametrize("wanted", [("lora_down_B",), ("lora_gate_and_up_A",), ()])
def test_only_wanted_gradients_are_there(engine: str, wanted: tuple[str, ...]) -> None:
    config = moe_config()
    batch, made = random_batch(config), layer(engine, config)
    alone = run_stacked(made, batch)
    for name in ADAPTER_NAMES:
        getattr(made, name).requires_grad_(name in wanted)
    found = run_stacked(made, batch)
    assert_same(found, {name: alone[name] for name in ("output", "x", "weights", *wanted)})


@on_every_engine
def test_a_compiled_layer_is_one_graph_gives_the_same_bits_and_trains_the_adapters(engine: str) -> None:
    config = moe_config(expert_bias=True)
    batch, made = random_batch(config), layer(engine, config)
    alone = run_stacked(made, batch)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    made.zero_grad()
    x, weights = batch.x.clone().requires_grad_(), batch.weights.clone().requires_grad_()
    output = compiled(x, batch.token_mask, weights, batch.indices)
    output.backward(batch.grad)
    assert x.grad is not None
    assert weights.grad is not None
    found = {"output": output.detach(), "x": x.grad, "weights": weights.grad, **made.stacked_grads()}
    assert_same(found, alone)


# merging


@on_every_engine
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_merging_gives_the_same_outputs_and_unmerging_the_same_bits(engine: str, dtype: torch.dtype) -> None:
    config = moe_config(dtype=dtype, expert_bias=True)
    batch, made, before = random_batch(config), layer(engine, config), drawn(config, 3)
    made.merge()
    with torch.no_grad():
        output = made(batch.x, batch.token_mask, batch.weights, batch.indices)
    assert_near({"output": output}, {"output": right(config, before, batch)["output"]}, dtype)
    assert not torch.equal(made.down_projs, before["down_projs"])
    assert_same(made.state_dict(), before)
    assert_same(copy.deepcopy(made).state_dict(), before)
    made.unmerge()
    assert_same(dict(made.named_parameters()), before)
    assert_near(run_stacked(made, batch), right(config, before, batch), dtype)


def refusal(call: Any) -> str:
    with pytest.raises((ConfigError, InputError)) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_merged_adapters_are_not_trained_merged_twice_or_loaded() -> None:
    made, batch = layer("loop", moe_config()), random_batch(moe_config())
    assert refusal(made.unmerge) == "the adapters are not merged; call merge() first"
    made.merge()
    assert refusal(made.merge) == "the adapters are merged already; call unmerge() first"
    assert "would get no gradients; call unmerge() before training" in refusal(lambda: run_stacked(made, batch))
    assert "call unmerge() first" in refusal(lambda: made.load_state_dict(drawn(moe_config(), 3)))
    made.requires_grad_(False)
    x = batch.x.requires_grad_()
    made(x, batch.token_mask, batch.weights, batch.indices).backward(batch.grad)
    assert_near({"x": x.grad}, {"x": right(moe_config(), drawn(moe_config(), 3), batch)["x"]}, F32)


# state dicts and configurations


def test_adapters_are_saved_and_loaded_alone() -> None:
    config = moe_config(expert_bias=True)
    made, other = layer("loop", config), GroupedExpertsLoRA(config, rank=3, alpha=ALPHA)
    other.load_state_dict(random_parameters(config, seed=8), strict=False)
    weights = random_parameters(config, seed=8)
    other.load_lora_state_dict(made.lora_state_dict())
    assert_same(made.lora_state_dict(), {name: drawn(config, 3)[name] for name in ADAPTER_NAMES})
    assert_same(other.state_dict(), weights | made.lora_state_dict())
    assert "has lora_gate_and_up_A, " in refusal(lambda: other.load_lora_state_dict(made.state_dict()))
    with pytest.raises(RuntimeError, match="size mismatch for lora_down_A"):
        other.load_lora_state_dict(layer("loop", config, rank=2).lora_state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(weights)


def test_pefts_matrices_hold_the_same_products() -> None:
    """peft multiplies `lora_B` [out, R, E] and `lora_A` [E, R, in] so: "o r e, e r i -> e i o"."""
    a, b = (drawn(moe_config(), 3)[name] for name in ADAPTER_NAMES[:2])
    weight_A, weight_B = to_peft(a, b)
    assert (tuple(weight_A.shape), tuple(weight_B.shape)) == ((4 * 3, 16), (16, 3 * 4))
    delta = torch.einsum("ore,eri->eio", weight_B.reshape(16, 3, 4), weight_A.reshape(4, 3, 16))
    torch.testing.assert_close(delta, a @ b)
    again_a, again_b = from_peft(weight_A, weight_B, 4)
    assert_same({"A": again_a, "B": again_b}, {"A": a, "B": b})
    assert "pass the two adapters of one projection" in refusal(
        lambda: to_peft(a, drawn(moe_config(), 2)["lora_down_B"])
    )
    assert "of 5 experts; pass the two weights" in refusal(lambda: from_peft(weight_A, weight_B, 5))


def test_float32_adapters_beside_bfloat16_weights_get_float32_gradients() -> None:
    config = moe_config(dtype=BF16)
    made, batch = layer("torch_mm", config, lora_dtype="float32"), random_batch(config)
    found = run_stacked(made, batch)
    assert {found[name].dtype for name in ADAPTER_NAMES} == {F32}
    assert made.down_projs.dtype is BF16
    assert_near(found, right(config, drawn(config, 3), batch), BF16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank = 0 must be a positive integer, for example 16"),
        ({"rank": True}, "rank = True must be a positive integer, for example 16"),
        ({"alpha": 0.0}, "alpha = 0.0 must be a positive finite number, for example 32.0"),
        ({"alpha": math.inf}, "alpha = inf must be a positive finite number, for example 32.0"),
        ({"lora_dtype": "int8"}, "lora_dtype = 'int8' is no dtype of adapters; give one of float64, float32, "),
        (
            {"backend": BackendConfig(experts="gmm")},
            "the engine gmm does not compute with adapters; use one of loop, torch_mm, triton",
        ),
        (
            {"backend": BackendConfig(experts="torch_mm", save="time")},
            "save = 'time': a layer with adapters keeps what save = 'memory' keeps; leave save out",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    assert refusal(lambda: GroupedExpertsLoRA(moe_config(), **arguments)).startswith(message)


def test_repr_shows_the_adapters() -> None:
    assert repr(layer("loop", moe_config())).endswith("engine=loop, rank=3, alpha=5, merged=False)")
