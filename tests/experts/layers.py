"""Layers to test: their configuration, seeded inputs and parameters, how to run them, and tolerances."""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from experts import BackendConfig, GroupedExperts, MoEConfig
from experts.layer import ExpertLayer
from tests.experts import oracle

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

#: Largest error of a row, relative to its norm: about ten roundings. One rounding is 2^-53, 2^-24, 2^-8 or 2^-11.
TOLERANCE = {F64: 1e-14, F32: 2e-6, BF16: 4e-2, F16: 5e-3}

Named = dict[str, Tensor]

ENGINES = ("loop", "torch_mm", "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Setup:
    """The engine, the device, and the dtype of activations and parameters of a test."""

    engine: str
    device: str
    dtype: torch.dtype

    def config(self, **fields: Any) -> MoEConfig:
        return moe_config(**{"dtype": self.dtype, **fields})

    def layer(self, config: MoEConfig, parameters: Named | None = None) -> GroupedExperts:
        return layer(self.engine, config, parameters, self.device)


def takes(engine: str, device: str, dtype: torch.dtype) -> bool:
    """Whether the engine supports the device and dtype. On a CPU, Triton needs its interpreter and float16."""
    if engine == "triton":
        return dtype in (F16, BF16) if device == "cuda" else INTERPRETED and dtype is F16
    return engine == "loop" or dtype is not F64


def _setups(devices: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> list[Any]:
    return [
        pytest.param(
            Setup(engine, device, dtype),
            id="-".join([engine, device, str(dtype).removeprefix("torch.")]),
            marks=[pytest.mark.gpu] if device == "cuda" else [],
        )
        for device in devices
        for engine in ENGINES
        for dtype in dtypes
        if takes(engine, device, dtype)
    ]


on_every_setup = pytest.mark.parametrize("setup", _setups(("cpu", "cuda"), (F64, F32, BF16, F16)))
on_cpu_and_gpu = pytest.mark.parametrize(
    "setup", _setups(("cpu",), (F32, F16) if INTERPRETED else (F32,)) + _setups(("cuda",), (F32, BF16))
)
on_every_engine = pytest.mark.parametrize("engine", ["loop", "torch_mm"])


def moe_config(**fields: Any) -> MoEConfig:
    defaults = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 8, "dtype": F32}
    return MoEConfig(**{**defaults, **fields})


def layer(engine: str, config: MoEConfig, parameters: Named | None = None, device: str = "cpu") -> GroupedExperts:
    with torch.device(device):
        made = GroupedExperts(config, BackendConfig(experts=engine))
    made.load_state_dict(parameters if parameters is not None else random_parameters(config))
    return made


def random_parameters(config: MoEConfig, seed: int = 1) -> Named:
    """Return parameters that give gate and up a standard deviation of about 1, and biases that change the result."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in GroupedExperts(config).named_parameters()}
    return {
        name: (
            torch.randn(shape, generator=generator, dtype=F64) / (1 if name.endswith("bias") else math.sqrt(shape[1]))
        ).to(config.dtype)
        for name, shape in shapes.items()
    }


def misaligned(tensor: Tensor) -> Tensor:
    """Return the same values in memory that starts between two multiples of 16 bytes."""
    view = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view(tensor.shape)
    assert view.copy_(tensor).data_ptr() % 16
    return view


def poisoned(*shape: Any, **options: Any) -> Tensor:
    """Return what `torch.empty` returns, filled with NaN, or with the largest integer."""
    worst = torch.nan if options["dtype"].is_floating_point else torch.iinfo(options["dtype"]).max
    sizes = shape[0] if isinstance(shape[0], tuple) else shape
    return torch.full(sizes, worst, **options)


@dataclass(frozen=True)
class Batch:
    """The inputs of a layer, and the gradient of its output."""

    x: Tensor
    token_mask: Tensor
    weights: Tensor
    indices: Tensor
    grad: Tensor

    def with_(self, **tensors: Tensor) -> "Batch":
        return dataclasses.replace(self, **tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(**{field.name: function(getattr(self, field.name)) for field in dataclasses.fields(self)})


def random_batch(config: MoEConfig, num_tokens: int = 7, seed: int = 2, indices: Any = None) -> Batch:
    """Return a batch without masked tokens. Routing weights are at least float32.

    A token's experts are distinct, unless `indices` gives them.
    """
    generator = torch.Generator().manual_seed(seed)
    experts, k = config.n_routed_experts, config.n_activated_experts
    chosen = torch.rand(num_tokens, experts, generator=generator).argsort(dim=1)[:, :k]
    if indices is not None:
        chosen = torch.as_tensor(indices, dtype=torch.int64).reshape(-1, k)
        num_tokens = chosen.shape[0]
    return Batch(
        x=torch.randn(num_tokens, config.dim, generator=generator, dtype=F64).to(config.dtype),
        token_mask=torch.ones(num_tokens, dtype=torch.bool),
        weights=torch.rand(num_tokens, k, generator=generator).to(torch.promote_types(config.dtype, F32)) + 0.2,
        indices=chosen,
        grad=torch.randn(num_tokens, config.dim, generator=generator, dtype=F64).to(config.dtype),
    )


def some_masked(batch: Batch) -> Batch:
    """Mask the first token, the fourth and the last."""
    mask = torch.ones_like(batch.token_mask)
    mask[[0, 3, -1]] = False
    return batch.with_(token_mask=mask)


def run(made: ExpertLayer, batch: Batch) -> Named:
    """Return `output` and the gradients of x, weights and the parameters by name, in their own dtypes and devices."""
    found = _step(made, batch)
    gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"no gradient for {missing}"
    return found | {name: gradient for name, gradient in gradients.items() if gradient is not None}


def run_stacked(made: ExpertLayer, batch: Batch) -> Named:
    """Do as `run`, but return the gradients of this rank's experts in the stacked layout for every module.

    A parameter without a gradient, such as a frozen one, has no entry.
    """
    return _step(made, batch) | made.stacked_grads()


def _step(made: ExpertLayer, batch: Batch) -> Named:
    made.zero_grad()
    device = next(made.parameters()).device
    batch = batch.map(lambda tensor: tensor.detach() if tensor.device == device else tensor.detach().to(device))
    x, weights = batch.x.requires_grad_(), batch.weights.requires_grad_()
    output = made(x, batch.token_mask, weights, batch.indices)
    output.backward(batch.grad)
    assert x.grad is not None
    assert weights.grad is not None
    return {"output": output.detach(), "x": x.grad, "weights": weights.grad}


def expected(config: MoEConfig, parameters: Named, batch: Batch, product: Any = torch.matmul) -> Named:
    """Return the oracle's output and gradients for parameters rounded to x's dtype.

    `product` multiplies the oracle's matrices.
    """
    return oracle.output_and_gradients(
        config.expert_activation,
        batch.x,
        batch.token_mask,
        batch.weights,
        batch.indices,
        {name: p.to(batch.x.dtype) for name, p in parameters.items()},
        batch.grad,
        product,
        alpha=config.activation_alpha,
        limit=config.activation_limit,
        swiglu_limit=config.swiglu_limit,
    )


def assert_near(found: Named, right: Named, dtype: torch.dtype) -> None:
    """Check every row (of a token or expert) of every tensor, relative to the norm of the row.

    A row that must be zero must be exactly zero. Terms may cancel in a token's row. If the tensor's root-mean-square
    row is larger than the row, the error is relative to the root-mean-square row. `dtype` is the dtype of the
    computation. A tensor with a coarser dtype has that dtype's tolerance.
    """
    assert found.keys() == right.keys()
    for name, reference in right.items():
        tensor, reference = (side.detach().to("cpu", F64) for side in (found[name], reference))
        assert tensor.shape == reference.shape, name
        assert torch.isfinite(tensor).all(), f"{name} is not finite"
        if reference.numel() == 0:
            continue
        rows, reference_rows = tensor.flatten(1), reference.flatten(1)
        sizes = reference_rows.norm(dim=1)
        assert torch.equal(tensor[sizes == 0], reference[sizes == 0]), f"{name} is not exactly zero where it must be"
        active = sizes[sizes > 0]
        if name in ("output", "x", "weights") and active.numel():
            sizes = torch.where(sizes > 0, sizes.clamp(min=float(active.square().mean().sqrt())), 0.0)
        errors = (rows - reference_rows).norm(dim=1)[sizes > 0] / sizes[sizes > 0]
        worst = float(errors.max()) if errors.numel() else 0.0
        tolerance = max(TOLERANCE[dtype], TOLERANCE[found[name].dtype])
        assert worst <= tolerance, f"{name} has a relative error of {worst:.1e}, more than {tolerance}"


def assert_same(found: Named, other: Named) -> None:
    """Check that both have the same tensors, bit for bit."""
    assert found.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(found[name], tensor), name


def check(setup: Setup, config: MoEConfig, batch: Batch, parameters: Named | None = None) -> Named:
    """Run a layer, compare it with the oracle, and return its output and gradients.

    Every gradient must have the dtype of its tensor.
    """
    parameters = random_parameters(config) if parameters is None else parameters
    made = setup.layer(config, parameters)
    found = run(made, batch)
    assert_near(found, expected(config, parameters, batch), batch.x.dtype)
    dtypes = {"output": batch.x.dtype, "x": batch.x.dtype, "weights": batch.weights.dtype}
    dtypes |= {name: p.dtype for name, p in made.named_parameters()}
    assert {name: tensor.dtype for name, tensor in found.items()} == dtypes
    return found
