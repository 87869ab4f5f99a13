"""The local experts as one autograd function: what it saves, what it frees, and that its results do not change."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from experts import BackendConfig, ConfigError, GroupedExperts, GroupedExpertsTE
from experts.compute import whole
from moebench.measure import memory
from tests.experts.layers import (
    BF16,
    F32,
    Named,
    assert_near,
    assert_same,
    expected,
    moe_config,
    random_batch,
    random_parameters,
    run,
)

CPU = torch.device("cpu")
CONFIG = moe_config(expert_bias=True)
on_every_save = pytest.mark.parametrize("save", ["memory", "time"])


def layer(save: str | None, engine: str = "torch_mm", **fields: object) -> GroupedExperts:
    config = moe_config(**{"expert_bias": True, **fields})
    made = GroupedExperts(config, BackendConfig(experts=engine, save=save))
    made.load_state_dict(random_parameters(config))
    return made


@pytest.mark.usefixtures("fake_libraries")
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@pytest.mark.parametrize("engine", ["torch_mm", "gmm"])
def test_the_option_save_changes_no_bit(engine: str, after: bool) -> None:
    batch = random_batch(CONFIG, indices=[[3, 0], [0, 0], [2, 3], [-1, -1], [-1, 2]])
    by_save = {
        save: run(layer(save, engine, apply_router_weight_after_down=after), batch) for save in (None, "memory", "time")
    }
    assert_near(by_save["time"], expected(CONFIG, random_parameters(CONFIG), batch), F32)
    assert_same(by_save["memory"], by_save["time"])
    assert_same(by_save["memory"], by_save[None])


@pytest.mark.parametrize(("save", "kept_rows"), [("memory", 0), ("time", 1)])
def test_saved_bytes_are_the_up_projection_and_with_time_the_rows(save: str, kept_rows: int) -> None:
    """Saved are the up projection's output and, with save = "time", the tokens' rows.

    The maps of the permutation have 24 bytes per row.
    """
    config = moe_config(dim=64, moe_inter_dim=48)
    made, batch = layer(save, dim=64, moe_inter_dim=48, expert_bias=False), random_batch(config, num_tokens=100)
    x, weights = batch.x.requires_grad_(), batch.weights.requires_grad_()
    found = memory.measure_memory(
        lambda: made(x, batch.token_mask, weights, batch.indices), lambda output: output.backward(batch.grad), CPU
    )
    rows, maps = 100 * config.n_activated_experts, config.n_routed_experts * 4
    saved = rows * (2 * config.moe_inter_dim + kept_rows * config.dim) * 4 + rows * 24 + maps
    assert found.saved_bytes == saved


@on_every_save
def test_two_backwards_of_one_graph_give_the_same_bits(save: str) -> None:
    """The first backward frees what forward saved. The second backward computes it again."""
    made, batch = layer(save), random_batch(CONFIG)
    x, weights = batch.x.requires_grad_(), batch.weights.requires_grad_()
    output = made(x, batch.token_mask, weights, batch.indices)
    wanted = [x, weights, *made.parameters()]
    first = torch.autograd.grad(output, wanted, batch.grad, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(output, wanted, batch.grad), strict=True):
        assert torch.equal(one, other)


@on_every_save
def test_backward_frees_only_what_forward_itself_saved(save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second backward computes again what the first one freed. What a hook saved is still there."""
    calls = []
    project_up = whole.project_up
    monkeypatch.setattr(whole, "project_up", lambda *arguments: calls.append(1) or project_up(*arguments))
    made, batch = layer(save), random_batch(CONFIG)
    for hooks, count in ((contextlib.nullcontext(), 2), (saved_tensors_hooks(torch.clone, torch.clone), 1)):
        calls.clear()
        with hooks:
            output = made(batch.x, batch.token_mask, batch.weights, batch.indices)
        for _ in range(2):
            output.backward(batch.grad, retain_graph=True)
        assert len(calls) == count


@on_every_save
@pytest.mark.parametrize(
    "alone", ["x", "weights", "gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"]
)
def test_a_single_gradient_has_the_same_bits(save: str, alone: str) -> None:
    """All other tensors are frozen. The gradient has the same bits as when all gradients are computed."""
    made, batch = layer(save), random_batch(CONFIG)
    right = run(made, batch)
    leaves = {"x": batch.x, "weights": batch.weights, **dict(made.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == alone)
        leaf.grad = None
    output = made(batch.x, batch.token_mask, batch.weights, batch.indices)
    output.backward(batch.grad)
    assert torch.equal(output, right["output"])
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {alone}
    assert torch.equal(leaves[alone].grad, right[alone])


@on_every_save
def test_without_gradients_the_output_is_the_same(save: str) -> None:
    made, batch = layer(save), random_batch(CONFIG)
    arguments = batch.x, batch.token_mask, batch.weights, batch.indices
    with torch.no_grad():
        output = made(*arguments)
    assert not output.requires_grad
    assert torch.equal(output, made(*arguments))


def through_hooks(made: GroupedExperts, *arguments: Tensor) -> Tensor:
    """Run the layer as offloading does: every saved tensor is copied away and back."""
    with saved_tensors_hooks(torch.clone, torch.clone):
        output: Tensor = made(*arguments)
    return output


def through_checkpoint(made: GroupedExperts, *arguments: Tensor) -> Tensor:
    """Run the layer under checkpointing: nothing is saved, and forward runs again in backward."""
    output: Tensor = checkpoint(made, *arguments, use_reentrant=False)
    return output


@on_every_save
@pytest.mark.parametrize("way", [through_hooks, through_checkpoint])
def test_torchs_ways_to_save_less_change_no_bit(save: str, way: Callable[..., Tensor]) -> None:
    made, batch = layer(save), random_batch(CONFIG)
    right = run(made, batch)
    made.zero_grad()
    x, weights = batch.x.detach().requires_grad_(), batch.weights.detach().requires_grad_()
    output = way(made, x, batch.token_mask, weights, batch.indices)
    output.backward(batch.grad)
    found: Named = {"output": output.detach(), "x": x.grad, "weights": weights.grad}
    assert_same(found | {name: p.grad for name, p in made.named_parameters()}, right)


@pytest.mark.parametrize("engine", ["loop", "torch_mm_mxfp8"])
def test_engines_without_the_option_save_refuse_it(engine: str) -> None:
    right = f"save = 'time': the engine {engine} cannot choose what it keeps for backward; use one of torch_mm"
    with pytest.raises(ConfigError, match=right):
        GroupedExperts(CONFIG, BackendConfig(experts=engine, save="time"))
    with pytest.raises(ConfigError, match="save = 'time': te cannot choose what it keeps for backward; leave save out"):
        GroupedExpertsTE(CONFIG, BackendConfig(save="time"))


@pytest.mark.gpu
@pytest.mark.parametrize("save", ["memory", "time"])
def test_the_peak_memory_of_a_train_step_is_bounded(save: str) -> None:
    """Buffers are freed after their last use.

    The bound is the largest sum of the buffers that must be alive at one moment of backward, and a few maps.
    """
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("grouped_mm has no kernel of its own before SM90")
    num_tokens, k, experts, dim, inter = 8192, 8, 16, 1024, 512
    config = moe_config(n_routed_experts=experts, n_activated_experts=k, dim=dim, moe_inter_dim=inter, dtype=BF16)
    with torch.device("cuda"):
        made = GroupedExperts(config, BackendConfig(experts="torch_mm", save=save))
    made.init_weights(torch.device("cuda"))
    batch = random_batch(config, num_tokens).map(lambda tensor: tensor.cuda())
    x, weights = batch.x.requires_grad_(), batch.weights.requires_grad_()

    def step() -> memory.Memory:
        made.zero_grad(set_to_none=True)
        x.grad = weights.grad = None
        return memory.measure_memory(
            lambda: made(x, batch.token_mask, weights, batch.indices),
            lambda output: output.backward(batch.grad),
            torch.device("cuda"),
        )

    step()
    column, token = num_tokens * k * 2, num_tokens * dim * 2  # of permuted rows; x, its gradient, the output
    up_grad, down_grad = experts * 2 * dim * inter * 2, experts * dim * inter * 2
    moments = {
        "memory": [
            up_grad + column * (dim + 3 * inter) + 2 * token,  # dx: its rows, h, the activation
            up_grad + down_grad + column * (dim + inter) + 2 * token,  # d(down): rows of the gradient, the activation
        ],
        "time": [
            down_grad + column * (2 * dim + 3 * inter) + token,  # d(down): also the tokens' rows and h
            up_grad + down_grad + column * (2 * dim + 2 * inter) + 2 * token,  # dx
        ],
    }
    assert step().peak_bytes <= 1.02 * max(moments[save]) + num_tokens * k * 64
