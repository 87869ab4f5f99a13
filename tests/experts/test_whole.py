"""The local experts as one autograd function: what it keeps, what it spends, and that nobody can tell."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from experts import BackendConfig, ConfigError, GroupedExperts, GroupedExpertsTE, MoEConfig
from experts.steps import Permutation, eager
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
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("engine", ["torch_mm", "gmm"])
def test_what_is_saved_changes_no_bit(engine: str, after: bool) -> None:
    batch = random_batch(CONFIG, indices=[[3, 0], [0, 0], [2, 3], [-1, -1], [-1, 2]])
    by_save = {
        save: run(layer(save, engine, apply_router_weight_after_down=after), batch) for save in (None, "memory", "time")
    }
    assert_near(by_save["time"], expected(CONFIG, random_parameters(CONFIG), batch), F32)
    assert_same(by_save["memory"], by_save["time"])
    assert_same(by_save["memory"], by_save[None])


@pytest.mark.parametrize(("save", "kept_rows"), [("memory", 0), ("time", 1)])
def test_saved_bytes(save: str, kept_rows: int) -> None:
    """The up projection's output, and the tokens' rows where time is worth more; the maps are 24 bytes a row."""
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
def test_two_backwards_of_one_graph(save: str) -> None:
    """The first spends what forward kept; the second makes it again."""
    made, batch = layer(save), random_batch(CONFIG)
    x, weights = batch.x.requires_grad_(), batch.weights.requires_grad_()
    output = made(x, batch.token_mask, weights, batch.indices)
    wanted = [x, weights, *made.parameters()]
    first = torch.autograd.grad(output, wanted, batch.grad, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(output, wanted, batch.grad), strict=True):
        assert torch.equal(one, other)


@on_every_save
@pytest.mark.parametrize(
    "alone", ["x", "weights", "gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"]
)
def test_a_gradient_wanted_alone(save: str, alone: str) -> None:
    """Everything else frozen: its bits are those that it has beside the others."""
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
    """As offloading does: what is saved is copied away and back."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        output: Tensor = made(*arguments)
    return output


def through_checkpoint(made: GroupedExperts, *arguments: Tensor) -> Tensor:
    """Nothing is saved; forward runs again in backward."""
    output: Tensor = checkpoint(made, *arguments, use_reentrant=False)
    return output


@on_every_save
@pytest.mark.parametrize("way", [through_hooks, through_checkpoint])
def test_ways_that_torch_has_to_save_less(save: str, way: Callable[..., Tensor]) -> None:
    made, batch = layer(save), random_batch(CONFIG)
    right = run(made, batch)
    made.zero_grad()
    x, weights = batch.x.detach().requires_grad_(), batch.weights.detach().requires_grad_()
    output = way(made, x, batch.token_mask, weights, batch.indices)
    output.backward(batch.grad)
    found: Named = {"output": output.detach(), "x": x.grad, "weights": weights.grad}
    assert_same(found | {name: p.grad for name, p in made.named_parameters()}, right)


def relu2_backward(
    h: Tensor, grad: Tensor, permutation: Permutation, weights: Tensor, bias: None, config: MoEConfig, again: bool
) -> tuple[Tensor, ...]:
    """`Steps.activate_backward` in formulas, as the kernels have it: torch's compiler stops at autograd.grad."""
    value, weight = h.float().relu(), weights.reshape(-1)[permutation.row_to_slot_N].unsqueeze(1)
    weight = torch.where(permutation.row_to_expert_N.unsqueeze(1) < len(permutation.offsets_L), weight, 0.0)
    by_weight = (grad * value.square()).sum(1)[permutation.slot_to_row_S].view(weights.shape)
    grad_weights = torch.where(permutation.is_local_TK, by_weight, 0.0)
    return (grad * weight * 2 * value).to(h.dtype), (value.square() * weight).to(h.dtype), grad_weights


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@on_every_save
def test_compiled(save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one graph, forward and backward, for any number of tokens."""
    monkeypatch.setattr(eager, "activate_backward", relu2_backward)
    monkeypatch.setattr(GroupedExperts, "_check_indices", lambda *_: None)  # which only a CPU's forward has
    fields = {"dtype": BF16, "expert_activation": "relu2", "expert_bias": False}
    made, compiled = layer(save, **fields), layer(save, **fields)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for num_tokens in (7, 5, 9):
        batch = random_batch(made.config, num_tokens)
        assert_same(run(compiled, batch), run(made, batch))


@pytest.mark.parametrize("engine", ["loop", "torch_mm_mxfp8"])
def test_engines_without_the_choice_refuse_it(engine: str) -> None:
    right = f"save = 'time': the engine {engine} cannot choose what it keeps for backward; use one of torch_mm"
    with pytest.raises(ConfigError, match=right):
        GroupedExperts(CONFIG, BackendConfig(experts=engine, save="time"))
    with pytest.raises(ConfigError, match="save = 'time': te cannot choose what it keeps for backward; leave save out"):
        GroupedExpertsTE(CONFIG, BackendConfig(save="time"))


@pytest.mark.gpu
@pytest.mark.parametrize("save", ["memory", "time"])
def test_peak_of_a_train_step(save: str) -> None:
    """Buffers die at their last use: the worst moments of backward, by what must be alive in each, and a few maps."""
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
