"""What a caller may do with a layer around forward and backward: the results of every engine stay the same, bit by bit.

test_corners.py and test_tensors.py compare single calls with the oracle.
"""

import contextlib
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from experts import BackendConfig, GroupedExperts, GroupedExpertsTE
from tests.experts.layers import (
    BF16,
    F16,
    F32,
    F64,
    Batch,
    Named,
    assert_near,
    assert_same,
    moe_config,
    random_batch,
    random_parameters,
    some_masked,
)

pytestmark = pytest.mark.usefixtures("fake_libraries")
LAYERS = ("loop", "torch_mm", "torch_mm-time", "gmm", "gmm-time", "te")
on_every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str, **fields: Any) -> Any:
    engine, _, save = name.partition("-")
    config = moe_config(**{"expert_bias": True, "moe_inter_dim": 16, **fields})
    backend = BackendConfig(experts=engine, save=save or None)  # type: ignore[arg-type]
    made = (GroupedExpertsTE if engine == "te" else GroupedExperts)(config, backend)
    made.load_state_dict(random_parameters(config))
    return made


class Call:
    """One forward of a layer, whose backward may run several times."""

    def __init__(self, made: Any, batch: Batch) -> None:
        self.made = made
        self.x, self.weights = (tensor.clone().requires_grad_() for tensor in (batch.x, batch.weights))
        self.output = made(self.x, batch.token_mask, self.weights, batch.indices)

    def backward(self, grad: Tensor, retain_graph: bool = False) -> Named:
        """Return the output and the gradients of this backward alone."""
        self.made.zero_grad()
        self.x.grad = self.weights.grad = None
        self.output.backward(grad, retain_graph=retain_graph)
        gradients = {"x": self.x.grad, "weights": self.weights.grad, **self.made.stacked_grads()}
        return {name: tensor.clone() for name, tensor in {"output": self.output.detach(), **gradients}.items()}


def run(made: Any, batch: Batch) -> Named:
    return Call(made, batch).backward(batch.grad)


def to_numpy(tensor: Tensor) -> Any:
    exact = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return exact.numpy().copy(), tensor.dtype


def from_numpy(packed: Any) -> Tensor:
    """Return a tensor in memory of numpy, which torch cannot free."""
    return torch.from_numpy(packed[0]).to(packed[1])


HOOKS = {
    "none": contextlib.nullcontext,
    "new tensors": lambda: saved_tensors_hooks(torch.clone, torch.clone),
    "the same tensors": lambda: saved_tensors_hooks(torch.clone, lambda tensor: tensor),
    "the given tensors": lambda: saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    "strided tensors": lambda: saved_tensors_hooks(torch.clone, lambda tensor: tensor.mT.clone().mT),
    "numpy": lambda: saved_tensors_hooks(to_numpy, from_numpy),
    "save_on_cpu": save_on_cpu,
}


@pytest.mark.parametrize("num_tokens", [7, 0])
@pytest.mark.parametrize("hooks", HOOKS)
@on_every_layer
def test_backwards_of_one_graph_with_several_gradients(name: str, hooks: str, num_tokens: int) -> None:
    """Each backward gives what a graph of its own gives, whatever a hook returns for the saved tensors.

    A CPU's float32 product may have other last bits if the memory of an operand has another alignment.
    """
    if hooks == "strided tensors" and name not in ("torch_mm", "torch_mm-time", "gmm", "gmm-time"):
        hooks = "new tensors"
    made = build(name)
    batch = random_batch(made.config, num_tokens)
    batch = some_masked(batch) if num_tokens else batch
    gradients = batch.grad, batch.grad.flip(1), batch.grad
    right = [run(made, batch.with_(grad=grad)) for grad in gradients]
    with HOOKS[hooks]():
        call = Call(made, batch)
    is_moved = name == "loop" and hooks not in ("none", "the given tensors")
    for grad, expected in zip(gradients, right, strict=True):
        found = call.backward(grad, retain_graph=True)
        if is_moved:
            assert_near(found, expected, made.config.dtype)
        else:
            assert_same(found, expected)


@on_every_layer
def test_tensors_that_a_hook_keeps_are_not_written(name: str) -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach().clone())
        return kept[-1]

    made = build(name)
    batch = random_batch(made.config)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        call = Call(made, batch)
    before = [tensor.clone() for tensor in kept]
    call.backward(batch.grad)
    assert before
    assert all(torch.equal(tensor, right) for tensor, right in zip(kept, before, strict=True))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
@on_every_layer
def test_two_forwards_before_their_backwards(name: str, order: tuple[int, ...]) -> None:
    """The calls have different numbers of tokens. The gradients of the parameters add up."""
    made = build(name)
    batches = some_masked(random_batch(made.config)), random_batch(made.config, num_tokens=9, seed=5)
    right = [run(made, batch) for batch in batches]
    made.zero_grad()
    calls = [Call(made, batch) for batch in batches]
    for index in order:
        calls[index].output.backward(batches[index].grad)
    for call, expected in zip(calls, right, strict=True):
        found = {"output": call.output.detach(), "x": call.x.grad, "weights": call.weights.grad}
        assert_same(found, {key: expected[key] for key in found})
    first, second = right
    assert_same(made.stacked_grads(), {key: first[key] + second[key] for key in made.stacked_grads()})


@on_every_layer
def test_without_anything_wanted_the_output_needs_no_gradient(name: str) -> None:
    made = build(name)
    batch = random_batch(made.config)
    right = run(made, batch)["output"]
    made.zero_grad()
    made.requires_grad_(False)
    output = made(batch.x, batch.token_mask, batch.weights, batch.indices)
    assert not output.requires_grad
    assert torch.equal(output, right)
    assert not made.stacked_grads()


@on_every_layer
def test_a_later_call_leaves_an_output_as_it_is(name: str) -> None:
    made = build(name)
    first, second = random_batch(made.config), random_batch(made.config, seed=5)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            output = made(first.x, first.token_mask, first.weights, first.indices)
            before = output.detach().clone()
            made(second.x, second.token_mask, second.weights, second.indices)
        assert torch.equal(output, before)


@on_every_layer
def test_a_pickled_layer_gives_the_same_bits(name: str) -> None:
    made = build(name)
    batch = random_batch(made.config)
    assert_same(run(pickle.loads(pickle.dumps(made)), batch), run(made, batch))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=str)
@on_every_layer
def test_a_state_dict_of_another_dtype_inside_a_model(name: str, dtype: torch.dtype, assign: bool) -> None:
    """With assign=True, the parameters take the dtype of the state dict."""
    model = nn.ModuleDict({"first": build(name, dtype=dtype), "second": build(name, dtype=dtype)})
    parameters = random_parameters(moe_config(expert_bias=True, moe_inter_dim=16), seed=4)
    state = {f"{part}.{key}": value for part in model for key, value in parameters.items()}
    model.load_state_dict(state, assign=assign)
    for part in model.values():
        assert {parameter.dtype for parameter in part.parameters()} == {F32 if assign else dtype}
        assert_same(dict(part.state_dict()), {key: p.to(F32 if assign else dtype) for key, p in parameters.items()})
    made = build(name)
    made.load_state_dict(parameters)
    if assign:
        batch = random_batch(made.config)
        assert_same(run(model["second"], batch), run(made, batch))


@pytest.mark.parametrize(("dtype", "size"), [(F32, 1e4), (BF16, 1e4), (F16, 6e4)], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "swigluoai", "quick_geglu", "geglu"])
@on_every_layer
def test_large_values_before_the_activation_give_no_nan(
    name: str, activation: str, dtype: torch.dtype, size: float
) -> None:
    """exp overflows for these values: a derivative that multiplied the overflow by zero would be NaN."""
    made = build(name, dtype=dtype, expert_activation=activation)
    parameters = random_parameters(made.config)
    bias = torch.tensor([size, -size, 0.0, -size, size, 1.0, -1.0, size]).repeat(4, 4)
    parameters = {key: (p / size * (1 if dtype is not F16 else 1e-4)).to(dtype) for key, p in parameters.items()}
    made.load_state_dict({**parameters, "gate_up_proj_bias": bias.to(dtype)})
    batch = random_batch(made.config)
    if dtype is F16:
        batch = batch.with_(grad=batch.grad / 1000, weights=batch.weights * 1e-6)
    for key, tensor in run(made, batch).items():
        assert not tensor.isnan().any(), key
