"""The engine triton_fp8: its layers beside the emulation of their recipe, and the weights that they keep.

test_fp8.py runs this file in Triton's interpreter.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from experts import BackendConfig, ConfigError, GroupedExperts, MoEConfig
from experts.config import Save
from experts.engines import get_engine
from moebench.parity.quantization import fp8_product
from tests.experts.layers import BF16, F16, INTERPRETED, expected, moe_config, random_batch, random_parameters, run

pytest.importorskip("triton")

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_fp8.py")
on_every_setup = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", F16, id="cpu-float16", marks=in_interpreter),
        pytest.param("cuda", BF16, id="cuda-bfloat16", marks=pytest.mark.gpu),
    ],
)


def made(
    recipe: str, config: MoEConfig, parameters: dict[str, Tensor], device: str, save: Save | None = None
) -> GroupedExperts:
    options = {
        "block_float32": {},
        "block_float32_e5m2": {"fp8_gradients": "e5m2"},
        "block_float32_16bit_dw": {"fp8_weight_gradients": False},
    }[recipe]
    with torch.device(device):
        backend = BackendConfig(experts="triton_fp8", save=save, **options)  # type: ignore[arg-type]
        layer = GroupedExperts(config, backend)
    layer.load_state_dict(parameters)
    return layer


def errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """Return the error of each tensor, relative to its norm."""
    assert found.keys() == right.keys()
    pairs = {name: (found[name].double().cpu(), tensor.double().cpu()) for name, tensor in right.items()}
    return {name: float((one - other).norm() / other.norm()) for name, (one, other) in pairs.items()}


def some(
    dtype: torch.dtype, activation: str = "quick_geglu", **fields: Any
) -> tuple[MoEConfig, dict[str, Tensor], Any]:
    """Return a configuration with partial blocks, parameters, and tokens of which some have no expert."""
    sizes = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 208, "moe_inter_dim": 144}
    bias = activation != "swiglu"
    config = moe_config(**{**sizes, "expert_bias": bias, "expert_activation": activation, "dtype": dtype, **fields})
    batch = random_batch(config, 20)
    batch.indices[:3] = -1
    batch.indices[batch.indices == 2] = -1  # an expert without rows
    return config, random_parameters(config), batch


@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "relu2"])
@pytest.mark.parametrize("recipe", ["block_float32", "block_float32_e5m2", "block_float32_16bit_dw"])
@on_every_setup
def test_a_layer_rounds_what_its_recipe_rounds_and_nothing_else(
    device: str, dtype: torch.dtype, recipe: str, activation: str
) -> None:
    """The emulation of the recipe comes far closer to the layer than the exact result does, in every tensor."""
    config, parameters, batch = some(dtype, activation)
    found = run(made(recipe, config, parameters, device), batch)
    halved = (config.dim, 2 * config.moe_inter_dim) if activation == "swiglu" else None
    emulated = errors(found, expected(config, parameters, batch, fp8_product(recipe, halved)))
    exact = errors(found, expected(config, parameters, batch))
    assert {name: tensor.dtype for name, tensor in found.items() if name != "weights"} == dict.fromkeys(
        found.keys() - {"weights"}, dtype
    )
    # a number between two FP8 numbers may go to the other one, as what comes before is rounded to 16 bits
    share = 0.5 if dtype is BF16 else 0.4
    in_fp8 = [name for name in exact if name != "down_proj_bias"]  # the sum of the output's gradients is exact
    assert {name: (emulated[name], exact[name]) for name in in_fp8 if emulated[name] > share * exact[name]} == {}
    assert {name: exact[name] for name in in_fp8 if exact[name] < 0.02} == {}


@on_every_setup
def test_a_layer_without_gradients_gives_the_same_output(device: str, dtype: torch.dtype) -> None:
    config, parameters, batch = some(dtype)
    layer = made("block_float32", config, parameters, device)
    output = run(layer, batch)["output"]
    on_device = batch.map(lambda tensor: tensor.to(device))
    with torch.no_grad():
        assert torch.equal(layer(on_device.x, on_device.token_mask, on_device.weights, on_device.indices), output)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["swiglu", "swigluoai", "geglu"])
@pytest.mark.parametrize("after", [False, True])
def test_many_rows_without_gradients_give_nearly_the_same_output(after: bool, activation: str) -> None:
    """On Hopper, one kernel multiplies and activates. It applies the routing weight to the scales."""
    fields = {"moe_inter_dim": 192, "expert_bias": False, "apply_router_weight_after_down": after}
    config, parameters, _ = some(BF16, activation, **fields)
    batch = random_batch(config, 600).map(lambda tensor: tensor.cuda())
    batch.weights[:5] = torch.tensor([-1.0, 0.0])
    batch.indices[batch.indices == 2] = -1
    layer = made("block_float32", config, parameters, "cuda")
    right = layer(batch.x, batch.token_mask, batch.weights, batch.indices).detach()
    with torch.no_grad():
        found = layer(batch.x, batch.token_mask, batch.weights, batch.indices)
    assert float((found - right).norm() / right.norm()) < 0.01
    assert torch.equal(found[(batch.indices < 0).all(dim=1)], right[(batch.indices < 0).all(dim=1)])


@pytest.mark.parametrize("save", ["memory", "time"])
@on_every_setup
def test_weights_are_quantised_when_the_caller_says_that_they_changed(
    device: str, dtype: torch.dtype, save: Save
) -> None:
    config, parameters, batch = some(dtype)
    layer = made("block_float32", config, parameters, device, save=save)
    on_device, weights = batch.map(lambda tensor: tensor.to(device)), 4 * 208 * 3 * 144
    with torch.no_grad():
        layer(on_device.x, on_device.token_mask, on_device.weights, on_device.indices)
    assert weights < layer.cached_weight_bytes < 1.01 * weights
    before = run(layer, batch)
    kept = layer.cached_weight_bytes
    num_layouts = 2 if save == "time" else 1
    assert num_layouts * weights < kept < 1.01 * num_layouts * weights, "backward reads another layout"
    with torch.no_grad():
        layer.down_projs *= -1
    assert torch.equal(run(layer, batch)["output"], before["output"]), "the caller has said nothing"
    layer.weights_changed()
    told = run(layer, batch)
    assert not torch.equal(told["output"], before["output"])
    fresh = made("block_float32", config, {**parameters, "down_projs": -parameters["down_projs"]}, device)
    assert all(torch.equal(tensor, told[name]) for name, tensor in run(fresh, batch).items())
    assert layer.cached_weight_bytes == kept
    layer.load_state_dict(parameters)
    assert torch.equal(run(layer, batch)["output"], before["output"]), "a load is told by the layer itself"


@pytest.mark.parametrize("save", ["memory", "time"])
@on_every_setup
def test_backward_reads_the_weights_that_a_forward_without_gradients_has_quantised(
    device: str, dtype: torch.dtype, save: Save
) -> None:
    config, parameters, batch = some(dtype, "swiglu")
    layer = made("block_float32", config, parameters, device, save=save)
    on_device = batch.map(lambda tensor: tensor.to(device))
    run(layer, batch)
    layer.load_state_dict({name: -tensor for name, tensor in parameters.items()})
    with torch.no_grad():
        layer(on_device.x, on_device.token_mask, on_device.weights, on_device.indices)
    right = made("block_float32", config, {name: -tensor for name, tensor in parameters.items()}, device)
    found = run(layer, batch)
    assert all(torch.equal(tensor, found[name]) for name, tensor in run(right, batch).items())


@pytest.mark.parametrize("save", ["memory", "time"])
@on_every_setup
def test_passes_with_the_same_weights_have_the_same_bits(device: str, dtype: torch.dtype, save: Save) -> None:
    """Calls read the layout that the call before kept, also while an earlier call still waits for its backward."""
    config, parameters, batch = some(dtype, "swiglu", n_routed_experts=3, dim=80, moe_inter_dim=48)
    layer = made("block_float32", config, parameters, device, save=save)
    given = batch.map(lambda tensor: tensor.to(device))
    right, quantised = run(layer, batch), layer.cached_weight_bytes
    again = run(layer, batch)
    assert {name for name, tensor in right.items() if not torch.equal(tensor, again[name])} == set()

    layer.zero_grad()
    x = given.x.clone().requires_grad_()
    outputs = [layer(x, given.token_mask, given.weights, given.indices) for _ in range(2)]
    with torch.no_grad():
        outputs.append(layer(given.x, given.token_mask, given.weights, given.indices))
    assert all(torch.equal(output, right["output"]) for output in outputs)
    outputs[0].backward(given.grad, retain_graph=True)
    first = x.grad.clone()
    assert torch.equal(first, right["x"])
    outputs[0].backward(given.grad)  # the forward pass is computed once more
    outputs[1].backward(given.grad)
    assert torch.equal(x.grad, first + first + first)
    assert layer.cached_weight_bytes == quantised


@pytest.mark.gpu
def test_a_graph_still_finds_the_weights_that_it_reads_after_a_train_step() -> None:
    config, parameters, batch = some(BF16, "swiglu")
    layer = made("block_float32", config, parameters, "cuda")
    given = batch.map(lambda tensor: tensor.cuda())
    arguments = given.x, given.token_mask, given.weights, given.indices
    with torch.no_grad():
        right = layer(*arguments).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(*arguments)
    run(layer, batch)
    taken = [torch.full_like(tensor, float("nan")) for tensor in layer.parameters() for _ in range(4)]
    graph.replay()
    assert torch.equal(captured, right)
    with torch.no_grad():
        layer.down_projs *= -1
    layer.weights_changed()
    run(layer, batch)
    graph.replay()
    assert torch.equal(captured, -right)
    del taken


@pytest.mark.filterwarnings("ignore")  # torch's compiler raises warnings about itself
@on_every_setup
def test_a_compiled_layer_runs_as_it_is(device: str, dtype: torch.dtype) -> None:
    config, parameters, batch = some(dtype)
    layer = made("block_float32_e5m2", config, parameters, device)
    right = run(layer, batch)
    torch._dynamo.reset()
    layer.compile(backend="eager")
    found = run(layer, batch)
    assert all(torch.equal(tensor, found[name]) for name, tensor in right.items())
    assert layer.cached_weight_bytes > 0


@on_every_setup
def test_an_update_between_forward_and_backward_raises(device: str, dtype: torch.dtype) -> None:
    config, parameters, batch = some(dtype)
    layer = made("block_float32", config, parameters, device)
    given = batch.map(lambda tensor: tensor.to(device))
    output = layer(given.x, given.token_mask, given.weights, given.indices)
    with torch.no_grad():
        layer.down_projs *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(given.grad)


@on_every_setup
def test_without_a_cache_the_bits_are_the_same(device: str, dtype: torch.dtype) -> None:
    config, parameters, batch = some(dtype)
    cached, fresh = (made("block_float32", config, parameters, device) for _ in range(2))
    fresh.weight_cache = None
    found, other = run(cached, batch), run(fresh, batch)
    assert all(torch.equal(tensor, other[name]) for name, tensor in found.items())
    assert fresh.cached_weight_bytes == 0


@pytest.mark.gpu
def test_a_graph_quantises_the_weights_at_each_replay() -> None:
    config, parameters, batch = some(BF16, "swiglu")
    layer = made("block_float32", config, parameters, "cuda")
    given = batch.map(lambda tensor: tensor.cuda())

    def step() -> Tensor:
        layer.zero_grad(set_to_none=True)
        layer.weights_changed()
        output: Tensor = layer(given.x, given.token_mask, given.weights, given.indices)
        output.backward(given.grad)
        return output.detach()

    first = step().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    with torch.no_grad():
        layer.down_projs *= -1
    graph.replay()
    replayed = captured.clone(), {name: grad.clone() for name, grad in grads.items() if grad is not None}
    assert torch.equal(replayed[0], -first)
    assert torch.equal(step(), replayed[0])
    assert all(torch.equal(parameter.grad, replayed[1][name]) for name, parameter in layer.named_parameters())


# what is refused


def test_options_of_fp8_need_an_fp8_engine() -> None:
    with pytest.raises(ConfigError, match="fp8_gradients = 'e5m2': the engine triton cannot choose what is in FP8"):
        GroupedExperts(moe_config(), BackendConfig(experts="triton", fp8_gradients="e5m2"))
    with pytest.raises(ConfigError, match="fp8_weight_gradients = False: the engine loop cannot choose what is in FP8"):
        GroupedExperts(moe_config(), BackendConfig(fp8_weight_gradients=False))


def test_the_engine_gives_the_reason_of_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    unsupported = get_engine("triton_fp8").unsupported
    fits = moe_config(dim=32, moe_inter_dim=16, dtype=BF16)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "needs a CUDA GPU, the device is cpu" in str(unsupported(torch.device("cpu"), fits))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    assert unsupported(gpu, fits) is None
    assert "takes bfloat16 and float16, not float32" in str(unsupported(gpu, moe_config(dim=32, moe_inter_dim=16)))
    odd = moe_config(dim=32, moe_inter_dim=24, dtype=BF16)
    assert "multiples of 16, but moe_inter_dim = 24" in str(unsupported(gpu, odd))
    for capability, reason in (((8, 6), "FP8 needs SM89, this is SM86"), ((12, 0), "shared memory of SM120")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert reason in str(unsupported(gpu, fits))
