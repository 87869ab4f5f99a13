"""GroupedExpertsTE with the real Transformer Engine, where it takes the sizes of the groups on the device."""

import functools

import pytest
import torch

from experts import GroupedExpertsTE, MoEConfig
from experts.te import library
from tests.experts.layers import (
    BF16,
    F16,
    F64,
    Batch,
    assert_near,
    assert_same,
    layer,
    moe_config,
    random_batch,
    random_parameters,
    run_stacked,
)
from tests.experts.test_gpu import corner_batch, in_float64, no_host_sync, on_gpu, poison_free_memory

pytestmark = pytest.mark.gpu
with_or_without_bias = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
INPUTS = ("x", "token_mask", "weights", "indices")


def te_layer(config: MoEConfig) -> GroupedExpertsTE:
    if library.not_installed() is not None:
        pytest.skip("transformer_engine does not import")
    if not library.takes_sizes_on_device(config.dtype):
        pytest.skip("this Transformer Engine takes sizes on the host; the other path needs cuBLASLt 13.4 on Hopper")
    with torch.device("cuda"):
        made = GroupedExpertsTE(config)
    made.load_state_dict(random_parameters(config))
    return made


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@with_or_without_bias
def test_never_waits_for_the_device(bias: bool, after: bool) -> None:
    made = te_layer(moe_config(dtype=BF16, expert_bias=bias, apply_router_weight_after_down=after))
    batch = corner_batch(made)
    x, weights = batch.x.requires_grad_(), batch.weights.requires_grad_()
    step = functools.partial(made, x, batch.token_mask, weights, batch.indices)
    step().backward(batch.grad)  # the first call makes TE's workspaces
    with no_host_sync():
        step().backward(batch.grad)
        with torch.no_grad():
            step()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@with_or_without_bias
def test_experts_without_rows_and_unwritten_memory(bias: bool, dtype: torch.dtype) -> None:
    """Some experts have no token. Then every expert has none, and every gradient is zero."""
    sizes = {"n_routed_experts": 64, "n_activated_experts": 6, "dim": 256, "moe_inter_dim": 192}
    config = moe_config(dtype=dtype, expert_bias=bias, **sizes)
    made, oracle = te_layer(config), layer("loop", config.with_dtype(F64), random_parameters(config), "cpu")
    batch = random_batch(config, num_tokens=500)
    batch.indices[batch.indices % 8 == 5] = 0
    batch.token_mask[::9] = False
    right = run_stacked(oracle, in_float64(batch))
    for _ in range(2):
        poison_free_memory()
        assert_near(run_stacked(made, on_gpu(batch)), right, dtype)
    poison_free_memory()
    nobody = run_stacked(made, on_gpu(batch.with_(indices=torch.full_like(batch.indices, -1))))
    assert not any(tensor.any() for tensor in nobody.values())


def test_every_run_gives_the_same_bits() -> None:
    made = te_layer(moe_config(dtype=BF16, n_routed_experts=16, dim=128, moe_inter_dim=64))
    batch = corner_batch(made, num_tokens=2000)
    first = {name: tensor.clone() for name, tensor in run_stacked(made, batch).items()}
    for _ in range(3):
        assert_same(run_stacked(made, batch), first)


@pytest.mark.parametrize("num_tokens", [32, 256])
@with_or_without_bias
def test_a_replayed_cuda_graph_gives_the_bits_of_a_normal_forward(num_tokens: int, bias: bool) -> None:
    """The graph is captured once and replayed with other tokens, another routing and another mask."""
    config = moe_config(dtype=BF16, expert_bias=bias)
    made, static = te_layer(config), on_gpu(random_batch(config, num_tokens=num_tokens))

    def forward(batch: Batch) -> torch.Tensor:
        output: torch.Tensor = made(*(getattr(batch, name) for name in INPUTS))
        return output

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            forward(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = forward(static)
    everything_to_one = random_batch(config, seed=21, indices=[[3, 3]] * num_tokens)
    nobody = random_batch(config, seed=22, indices=[[-1, -1]] * num_tokens)
    masked = random_batch(config, num_tokens, seed=23)
    masked.token_mask[::2] = False
    for batch in map(on_gpu, (everything_to_one, nobody, masked)):
        for name in INPUTS:
            getattr(static, name).copy_(getattr(batch, name))
        graph.replay()
        with torch.no_grad():
            assert torch.equal(output, forward(batch))
