"""Facts that only a GPU can show: no host sync, CUDA graphs, used memory, agreement with the CPU.

The corner cases of test_corners.py and test_tensors.py and the tests of the engines also run on the GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from experts import BackendConfig, GroupedExperts
from tests.experts.layers import (
    BF16,
    ENGINES,
    F16,
    F32,
    F64,
    Batch,
    assert_near,
    assert_same,
    layer,
    moe_config,
    random_batch,
    random_parameters,
    run,
    takes,
)

pytestmark = pytest.mark.gpu

on_every_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
on_every_engine = pytest.mark.parametrize("engine", ENGINES)
on_every_engine_and_dtype = pytest.mark.parametrize(
    ("engine", "dtype"),
    [(engine, dtype) for engine in ENGINES for dtype in (F32, BF16, F16) if takes(engine, "cuda", dtype)],
    ids=str,
)
without_sync = pytest.mark.parametrize("engine", ["torch_mm", "triton"])


def needs_sm90() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("grouped_mm has no kernel of its own before SM90")


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Make every operation that waits for the device raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(batch: Batch) -> Batch:
    return batch.map(lambda tensor: tensor.cuda())


def corner_batch(made: GroupedExperts, num_tokens: int = 64) -> Batch:
    """Return a batch with masked tokens, indices of −1, one expert twice and an expert without tokens."""
    batch = random_batch(made.config, num_tokens)
    batch.indices[batch.indices == 1] = 2
    batch.indices[::5, 0] = -1
    batch.token_mask[::7] = False
    return on_gpu(batch)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "relu2"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("parameters", [BF16, F32], ids=["bfloat16", "float32-parameters"])
@without_sync
def test_never_waits_for_the_device(
    engine: str, parameters: torch.dtype, bias: bool, activation: str, after: bool
) -> None:
    needs_sm90()
    config = moe_config(
        dtype=parameters, expert_bias=bias, expert_activation=activation, apply_router_weight_after_down=after
    )
    made = layer(engine, config, device="cuda")
    batch = corner_batch(made)
    x, grad = batch.x.to(BF16).requires_grad_(), batch.grad.to(BF16)
    weights = batch.weights.requires_grad_()
    with no_host_sync():
        for _ in range(2):
            made(x, batch.token_mask, weights, batch.indices).backward(grad)
        with torch.no_grad():
            made(x, batch.token_mask, weights, batch.indices)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_the_sync_that_the_loop_needs_is_detected() -> None:
    """If it were not detected, the test above could not fail."""
    made = layer("loop", moe_config(dtype=BF16), device="cuda")
    batch = corner_batch(made)
    with no_host_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        made(batch.x, batch.token_mask, batch.weights, batch.indices)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("num_tokens", [32, 256])
@without_sync
def test_a_replayed_cuda_graph_gives_the_bits_of_a_normal_forward(engine: str, num_tokens: int, bias: bool) -> None:
    """The graph is captured once and replayed with other tokens, another routing and another mask."""
    needs_sm90()
    config = moe_config(dtype=BF16, expert_bias=bias)
    made = layer(engine, config, device="cuda")
    static = on_gpu(random_batch(config, num_tokens=num_tokens))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            made(static.x, static.token_mask, static.weights, static.indices)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = made(static.x, static.token_mask, static.weights, static.indices)

    everything_to_one = random_batch(config, seed=21, indices=[[3, 3]] * num_tokens)
    nobody = random_batch(config, seed=22, indices=[[-1, -1]] * num_tokens)
    masked = random_batch(config, num_tokens, seed=23)
    masked.token_mask[::2] = False
    for batch in map(on_gpu, (everything_to_one, nobody, masked)):
        for name in ("x", "token_mask", "weights", "indices"):
            getattr(static, name).copy_(getattr(batch, name))
        graph.replay()
        with torch.no_grad():
            right = made(batch.x, batch.token_mask, batch.weights, batch.indices)
        assert torch.equal(output, right)


@pytest.mark.filterwarnings("ignore")  # torch's compiler raises warnings about itself
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@on_every_engine
def test_a_compiled_layer_gives_the_same_result(engine: str, bias: bool) -> None:
    """A train step under torch.compile is one graph, and near the one without it, for several numbers of tokens."""
    needs_sm90()
    config = moe_config(dtype=BF16, expert_bias=bias)
    made, compiled = (layer(engine, config, device="cuda") for _ in range(2))
    compiled.compile(fullgraph=True)
    for num_tokens in (64, 48, 80):
        batch = corner_batch(made, num_tokens)
        assert_near(run(compiled, batch), run(made, batch), BF16)


def poison_free_memory() -> None:
    """Fill the free memory of the allocator with NaN: large blocks first, then small blocks in the gaps."""
    torch.cuda.empty_cache()
    counts = {1 << 18: 16, 1 << 15: 64, 1 << 12: 256, 1 << 9: 1024, 1 << 7: 4096}
    blocks = [torch.full((size,), torch.nan, device="cuda") for size, count in counts.items() for _ in range(count)]
    del blocks


@pytest.mark.parametrize("size", [100, 1000, 10_000, 100_000])
def test_poisoned_free_memory_is_used_again(size: int) -> None:
    poison_free_memory()
    blocks = [torch.empty(size, device="cuda") for _ in range(20)]
    assert sum(bool(block.isnan().all()) for block in blocks) > 10


@on_every_engine_and_dtype
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "relu2"])
def test_unwritten_memory_changes_nothing(engine: str, dtype: torch.dtype, bias: bool, activation: str) -> None:
    config = moe_config(dtype=dtype, expert_bias=bias, expert_activation=activation)
    made = layer(engine, config, device="cuda")
    batch = corner_batch(made)
    oracle = layer("loop", config.with_dtype(F64), random_parameters(config), "cpu")
    right = run(oracle, in_float64(batch))
    for _ in range(2):
        poison_free_memory()
        assert_near(run(made, batch), right, dtype)


def in_float64(batch: Batch) -> Batch:
    return batch.map(lambda tensor: tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu())


@on_every_engine_and_dtype
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "relu2"])
def test_agrees_with_the_cpu_in_float64(engine: str, dtype: torch.dtype, activation: str) -> None:
    """The sizes need several tiles: many experts, several hundred tokens, and some experts without tokens."""
    config = moe_config(
        n_routed_experts=64,
        n_activated_experts=6,
        dim=256,
        moe_inter_dim=192,
        dtype=dtype,
        expert_bias=True,
        expert_activation=activation,
    )
    batch = random_batch(config, num_tokens=500)
    batch.indices[batch.indices % 8 == 5] = 0
    batch.token_mask[::9] = False
    oracle = layer("loop", config.with_dtype(F64), random_parameters(config), "cpu")
    assert_near(run(layer(engine, config, device="cuda"), batch), run(oracle, in_float64(batch)), dtype)


@on_every_dtype
@without_sync
def test_every_run_gives_the_same_bits(engine: str, dtype: torch.dtype) -> None:
    if not takes(engine, "cuda", dtype):
        pytest.skip(f"{engine} does not take {dtype}")
    config = moe_config(
        n_routed_experts=16, n_activated_experts=4, dim=128, moe_inter_dim=64, dtype=dtype, expert_bias=True
    )
    made = layer(engine, config, device="cuda")
    batch = corner_batch(made, num_tokens=2000)
    first = {name: tensor.clone() for name, tensor in run(made, batch).items()}
    for _ in range(4):
        assert_same(run(made, batch), first)


@on_every_engine
def test_parameters_on_the_meta_device_become_real_on_the_gpu(engine: str) -> None:
    with torch.device("meta"):
        made = GroupedExperts(moe_config(dtype=BF16), BackendConfig(experts=engine))
    made.init_weights(torch.device("cuda"))
    assert {p.device.type for p in made.parameters()} == {"cuda"}
    run(made, random_batch(made.config))


@on_every_engine
def test_an_index_out_of_range_contributes_nothing(engine: str) -> None:
    """A check of the indices would wait for the device. Such an index must not read past the parameters."""
    config = moe_config(dtype=BF16)
    made = layer(engine, config, device="cuda")
    batch = random_batch(config)
    batch.indices[2, 0] = -1
    right = run(made, batch)
    for wrong in (4, -2, 1 << 40):
        batch.indices[2, 0] = wrong
        assert_same(run(made, batch), right)
