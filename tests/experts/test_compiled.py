"""Layers under torch.compile: one graph, the results of the layer without the compiler, and few recompilations.

The setups with Triton's interpreter run in the process of test_gemm.py's test_in_tritons_interpreter.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import experts.layer
from experts import BackendConfig, GroupedExperts, InputError, MoEConfig, Unsupported, compiled
from experts.compute import PARAMETER_NAMES
from experts.dispatch import Dispatched, Local
from tests.experts.layers import (
    BF16,
    F32,
    F64,
    Setup,
    assert_near,
    assert_same,
    layer,
    moe_config,
    on_cpu_and_gpu,
    on_every_engine,
    random_batch,
    random_parameters,
    run,
    some_masked,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler raises warnings about itself

#: Expert 1 has no tokens. Some choices are −1, and one token chooses an expert twice.
INDICES = [[3, 0], [0, 0], [2, 3], [-1, -1], [-1, 2], [3, 2]]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A layer with a router before it and a residual connection around it."""

    def __init__(self, setup: Setup, config: MoEConfig) -> None:
        super().__init__()
        self.experts = setup.layer(config)
        torch.manual_seed(3)
        self.router = nn.Linear(
            config.dim, config.n_routed_experts, bias=False, device=setup.device, dtype=config.dtype
        )

    def forward(self, x: Tensor, token_mask: Tensor) -> Tensor:
        probabilities = self.router(x).softmax(dim=-1, dtype=F32)
        weights, indices = probabilities.topk(self.experts.config.n_activated_experts)
        output: Tensor = x + self.experts(x, token_mask, weights, indices)
        return output

    def step(self, x: Tensor, token_mask: Tensor, grad: Tensor) -> dict[str, Tensor]:
        self.zero_grad()
        x = x.detach().requires_grad_()
        output = self(x, token_mask)
        output.backward(grad)
        grads = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        assert x.grad is not None
        return {"output": output.detach(), "x": x.grad, **grads}


@on_cpu_and_gpu
def test_a_block_is_one_graph_that_takes_any_number_of_tokens(setup: Setup) -> None:
    """With `fullgraph` a graph break is an error. The second number of tokens compiles for all numbers but 0 and 1."""
    config = setup.config(expert_bias=True)
    plain, block = Block(setup, config), Block(setup, config)
    counter = CompileCounterWithBackend("aot_eager")
    block.compile(backend=counter, fullgraph=True)
    graphs = {}
    for num_tokens in (7, 5, 9, 7, 12, 1, 0, 6):
        batch = random_batch(config, num_tokens)
        batch.token_mask[1::3] = False
        given = [tensor.to(setup.device) for tensor in (batch.x, batch.token_mask, batch.grad)]
        assert_near(block.step(*given), plain.step(*given), config.dtype)
        graphs[num_tokens] = counter.frame_count
    assert graphs == {7: 2, 5: 2, 9: 2, 12: 2, 1: 3, 0: 4, 6: 4}
    kept = setup.engine != "loop"  # the loop computes forward again in backward
    names = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert [name for name in names if name.startswith("experts.")] == [
        "experts.compute_and_keep.default" if kept else "experts.compute.default"
    ]


@on_cpu_and_gpu
def test_without_gradients_a_block_is_one_graph_that_keeps_nothing(setup: Setup) -> None:
    config = setup.config()
    block = Block(setup, config)
    batch = random_batch(config)
    given = batch.x.to(setup.device), batch.token_mask.to(setup.device)
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        right = block(*given)
        block.compile(backend=counter, fullgraph=True)
        found = block(*given)
    assert_near({"output": found}, {"output": right}, config.dtype)
    (graph,) = counter.graphs
    assert "experts.compute.default" in {str(node.target) for node in graph.graph.nodes}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"expert_bias": True}, {"expert_activation": "relu2"}, {"expert_activation": "quick_geglu"}],
    ids=["plain", "bias", "relu2", "quick_geglu"],
)
@pytest.mark.parametrize(("engine", "save"), [("loop", None), ("torch_mm", "memory"), ("torch_mm", "time")])
def test_the_operators_give_the_engines_bits(
    engine: str, save: Any, fields: dict[str, Any], after: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called without the compiler, with empty experts, choices of −1 and masked tokens whose rows are NaN."""
    config = moe_config(dtype=dtype, apply_router_weight_after_down=after, **fields)
    made = GroupedExperts(config, BackendConfig(experts=engine, save=save))
    made.load_state_dict(random_parameters(config))
    batch = some_masked(random_batch(config, indices=INDICES))
    batch.x[~batch.token_mask] = torch.nan
    right = run(made, batch)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_same(run(made, batch), right)


@on_every_engine
@pytest.mark.parametrize("wanted", ["x", "weights", "gate_and_up_projs", "down_proj_bias"])
def test_only_wanted_gradients_are_returned(engine: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    made = layer(engine, moe_config(expert_bias=True))
    batch = random_batch(made.config)
    tensors = {"x": batch.x, "weights": batch.weights, **dict(made.named_parameters())}
    made.requires_grad_(False)
    tensors[wanted].requires_grad_()
    made(batch.x, batch.token_mask, batch.weights, batch.indices).backward(batch.grad)
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [wanted]
    monkeypatch.undo()
    found = tensors[wanted].grad
    tensors[wanted].grad = None
    made(batch.x, batch.token_mask, batch.weights, batch.indices).backward(batch.grad)
    assert torch.equal(found, tensors[wanted].grad)


@on_cpu_and_gpu
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_torch_accepts_the_operators(setup: Setup, bias: bool) -> None:
    """opcheck: the fakes' shapes, strides and dtypes, no hidden mutation or alias, and autograd under AOTAutograd."""
    config = setup.config(expert_bias=bias)
    made = setup.layer(config)
    # all choices are local, because rows past the last group may hold anything and opcheck compares them
    batch = random_batch(config, indices=[[3, 0], [0, 0], [2, 3], [3, 2], [0, 2]])
    batch = batch.map(lambda tensor: tensor.to(setup.device))
    tensors = [batch.x, batch.weights, *(getattr(made, name) for name in PARAMETER_NAMES)]
    tensors = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    plain = [None if tensor is None else tensor.detach() for tensor in tensors]
    wanted = [tensor is not None for tensor in tensors]
    settings = setup.engine, compiled.described(config), 0
    operators = torch.ops.experts
    # without and with adapters
    up, down = (made.gate_and_up_projs.shape, made.down_projs.shape)
    shapes = [(shape[0], *size) for shape in (up, down) for size in ((shape[1], 8), (8, shape[2]))]
    drawn = [torch.randn(shape, device=setup.device, dtype=config.dtype) for shape in shapes]
    for adapters in ([None] * 4, drawn):
        given = [None if one is None else one.clone().requires_grad_() for one in adapters]
        own = tensors if adapters[0] is None else [*tensors[:2], *plain[2:]]  # the weights beside adapters are frozen
        first = *own, *given, batch.indices, *settings, None, 0.5
        torch.library.opcheck(operators.compute.default, first)
        again = batch.grad, *plain, *adapters, batch.indices, *settings, None, 0.5
        wants = [one is not None and one.requires_grad for one in (*own, *given)]
        torch.library.opcheck(operators.compute_again.default, (*again, wants))
    if setup.engine == "loop":
        return
    for save in ("memory", "time"):
        forward = *tensors, batch.indices, *settings, save
        torch.library.opcheck(operators.compute_and_keep.default, forward)
        kept = [tensor.detach() for tensor in operators.compute_and_keep(*forward)[1:]]
        backward = batch.grad, *plain, *kept, *settings[:2], save, wanted
        torch.library.opcheck(operators.compute_backward.default, backward)


@on_every_engine
def test_a_second_backward_of_the_operators_gives_the_same_bits(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward overwrites the up projection's output, so it must not write into what autograd keeps."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    made = layer(engine, moe_config())
    batch = random_batch(made.config)
    output = made(batch.x.requires_grad_(), batch.token_mask, batch.weights, batch.indices)
    first, second = (torch.autograd.grad(output, [batch.x], batch.grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@on_every_engine
def test_a_compiled_layer_refuses_what_the_layer_refuses(engine: str) -> None:
    made = layer(engine, moe_config())
    made.compile(backend="eager", fullgraph=True)
    batch = random_batch(made.config, indices=[[0, 4]])
    with pytest.raises(InputError, match=r"indices run from 0 to 4, but must be from -1 \(no expert\) to 3"):
        made(batch.x, batch.token_mask, batch.weights, batch.indices)
    if engine == "torch_mm":
        right = random_batch(made.config)
        with pytest.raises(Unsupported, match="torch_mm: grouped_mm takes float32, bfloat16 and float16, not float64"):
            made(right.x.to(F64), right.token_mask, right.weights, right.indices)


class OfRanks(Local):
    """Stands for the dispatcher of several ranks, and notes where the compiler is when it is called."""

    def __init__(self) -> None:
        self.traced: list[bool] = []

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        self.traced.append(torch.compiler.is_compiling())
        return super().dispatch(x_TD, weights_TK, indices_TK)


def test_a_layer_of_several_ranks_runs_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler fails in some dispatchers (torch 2.13)."""
    monkeypatch.setattr(experts.layer, "Local", type(None))
    made = layer("torch_mm", moe_config())
    made.dispatcher = OfRanks()
    batch = random_batch(made.config)
    right = run(made, batch)
    made.compile(backend="eager")
    assert_same(run(made, batch), right)
    assert made.dispatcher.traced == [False, False]


class Operators(TorchDispatchMode):
    """Lists the operators of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@on_every_engine
@pytest.mark.parametrize("compiling", [False, True], ids=["not-compiled", "compiled"])
def test_only_a_compiled_layer_calls_the_operators(
    engine: str, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiling:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    made = layer(engine, moe_config())
    with Operators() as called:
        run(made, random_batch(made.config))
    assert any(name.startswith("experts.") for name in called.names) is compiling


@pytest.mark.certify
@on_every_engine
def test_the_default_compiler_gives_the_same_result(engine: str, certify: bool) -> None:
    if not certify:
        pytest.skip("the compiler inductor takes long: `make certify` runs it")
    made, other = (layer(engine, moe_config(dtype=BF16, expert_bias=True)) for _ in range(2))
    other.compile(fullgraph=True)
    for num_tokens in (7, 5):
        batch = random_batch(made.config, num_tokens)
        assert_near(run(other, batch), run(made, batch), BF16)
