"""A layer ignores torch.autocast: it computes in x's dtype, wherever forward and backward run."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experts import BackendConfig, GroupedExperts, GroupedExpertsTE
from experts.autocast import product
from tests.experts import layers
from tests.experts.layers import BF16, F32, F64, Named, assert_same, moe_config, random_batch

CONFIG = {"expert_bias": True, "moe_inter_dim": 16}
both_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def autocast(on: bool) -> contextlib.AbstractContextManager[Any]:
    """Return an autocast to float16: operators that combine tensors in it refuse bfloat16."""
    return torch.autocast("cpu", torch.float16) if on else contextlib.nullcontext()


def build(name: str, **fields: Any) -> nn.Module:
    config = moe_config(**{**CONFIG, **fields})
    made = GroupedExpertsTE(config) if name == "te" else GroupedExperts(config, BackendConfig(experts=name))
    made.load_state_dict(layers.random_parameters(config))
    return made


def run(made: Any, forward: bool, backward: bool, call: Callable[..., Tensor] | None = None) -> Named:
    """Return output and gradients, with forward and backward inside or outside of autocast."""
    batch = random_batch(made.config)
    x, weights = batch.x.requires_grad_(), batch.weights.requires_grad_()
    made.zero_grad()
    with autocast(forward):
        output = (call or made)(x, batch.token_mask, weights, batch.indices)
    with autocast(backward):
        output.backward(batch.grad)
    return {"output": output.detach(), "x": x.grad, "weights": weights.grad, **made.stacked_grads()}


@pytest.mark.usefixtures("fake_libraries")
@pytest.mark.parametrize(("forward", "backward"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@both_dtypes
@pytest.mark.parametrize("engine", ["loop", "torch_mm", "gmm", "te"])
def test_autocast_changes_no_bit(engine: str, dtype: torch.dtype, after: bool, forward: bool, backward: bool) -> None:
    made = build(engine, dtype=dtype, apply_router_weight_after_down=after)
    right = run(made, False, False)
    assert right["output"].dtype is dtype
    assert_same(run(made, forward, backward), right)


@pytest.mark.usefixtures("fake_libraries")
@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
@pytest.mark.parametrize(("forward", "backward"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("engine", ["loop", "torch_mm", "te"])
def test_autocast_changes_no_bit_under_checkpointing(
    engine: str, forward: bool, backward: bool, reentrant: bool
) -> None:
    made = build(engine)

    def call(*arguments: Tensor) -> Tensor:
        output: Tensor = checkpoint(made, *arguments, use_reentrant=reentrant)
        return output

    assert_same(run(made, forward, backward, call), run(made, False, False))


@pytest.mark.parametrize("engine", ["loop", "torch_mm"])
def test_autocast_changes_no_bit_without_gradients(engine: str) -> None:
    made, batch = build(engine), random_batch(moe_config(**CONFIG))
    with torch.no_grad():
        right = made(batch.x, batch.token_mask, batch.weights, batch.indices)
        with autocast(True):
            assert torch.equal(made(batch.x, batch.token_mask, batch.weights, batch.indices), right)


@pytest.mark.parametrize("engine", ["loop", "torch_mm"])
def test_autocast_is_on_again_after_the_layer(engine: str) -> None:
    made = build(engine)
    batch = random_batch(made.config)
    x, ones = batch.x.requires_grad_(), torch.ones(16, 16, requires_grad=True)
    with autocast(True):
        made(x @ ones, batch.token_mask, batch.weights, batch.indices).float().sum().backward()
        assert (ones @ ones).dtype is torch.float16


def test_the_product_can_be_differentiated_twice() -> None:
    a, b = (torch.randn(3, 3, dtype=F64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(product, (a, b))
    assert torch.autograd.gradgradcheck(product, (a, b))


@pytest.mark.filterwarnings("ignore")  # torch's compiler raises warnings about itself
@pytest.mark.parametrize("engine", ["loop", "torch_mm"])
def test_a_compiled_layer_ignores_autocast(engine: str) -> None:
    made = build(engine, dtype=BF16)
    right = run(made, False, False)
    made.compile(backend="aot_eager", fullgraph=True)
    for forward, backward in [(False, False), (True, False), (False, True), (True, True)]:
        assert_same(run(made, forward, backward), right)
