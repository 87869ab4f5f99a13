"""Weighted activations against numbers computed by hand and the oracle; their layouts, limits and dtypes."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from experts import InputError, MoEConfig, get_expert_activation_for_deepep, quick_geglu_deepep, relu2_deepep
from experts.activations import accumulation_dtype, geglu_deepep, swiglu_deepep, swigluoai_deepep
from tests.experts import oracle
from tests.experts.layers import BF16, F16, F32, F64, TOLERANCE

NAMES = ("swiglu", "swigluoai", "quick_geglu", "geglu", "relu2")
GATED = NAMES[:-1]
INTER = 6
LIMITS = {"alpha": 1.3, "limit": 0.83, "swiglu_limit": 0.71}


def activation(name: str, **fields: Any) -> Callable[[Tensor, Tensor], Tensor]:
    sizes = {"n_routed_experts": 2, "n_activated_experts": 1, "dim": 4, "moe_inter_dim": INTER}
    return get_expert_activation_for_deepep(MoEConfig(**sizes, expert_activation=name, **fields))


def limited(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return activation(name, activation_alpha=1.3, activation_limit=0.83, swiglu_limit=0.71)


def rows(name: str, num_rows: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    width = INTER if name == "relu2" else 2 * INTER
    x_ND = torch.randn(num_rows, width, generator=generator, dtype=F64)
    return x_ND, torch.rand(num_rows, generator=generator, dtype=F64) + 0.2


def by_oracle(name: str, x_ND: Tensor, probs_N: Tensor, **limits: float) -> Tensor:
    pairs = zip(x_ND.to(F64), probs_N.to(F64), strict=True)
    return torch.stack([oracle.activation(name, x, **limits) * prob for x, prob in pairs])


def assert_rounded_once(found: Tensor, right: Tensor) -> None:
    """Allow half an ulp of the dtype, and a few roundings in float32 (float64 for float64)."""
    once = torch.finfo(found.dtype).eps / 2 * right.abs()
    inside = 10 * torch.finfo(accumulation_dtype(found.dtype)).eps * (1 + right.abs())
    assert bool(((found.double() - right).abs() <= once + inside).all())


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


GELU_1 = 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))


@pytest.mark.parametrize(
    ("call", "x", "result"),
    [
        # concatenated: gates 1, 3; ups 2, -4
        (swiglu_deepep, [1, 3, 2, -4], [sigmoid(1) * 2, 3 * sigmoid(3) * -4]),
        (lambda x, p: swiglu_deepep(x, p, limit=1.5), [1, 3, 2, -4], [sigmoid(1) * 1.5, 1.5 * sigmoid(1.5) * -1.5]),
        (lambda x, p: swiglu_deepep(x, p, limit=1.5), [-9, 0, 2, 1], [-9 * sigmoid(-9) * 1.5, 0]),
        (geglu_deepep, [1, 0, 2, -4], [GELU_1 * 2, 0]),
        (swigluoai_deepep, [1, 9, 2, -9], [sigmoid(1.702) * 3, 7 * sigmoid(7 * 1.702) * -6]),
        # interleaved: gates 1, 9; ups 2, -9
        (quick_geglu_deepep, [1, 2, 9, -9], [sigmoid(1.702) * 3, 7 * sigmoid(7 * 1.702) * -6]),
        (
            lambda x, p: quick_geglu_deepep(x, p, alpha=2.0, limit=0.5, linear_offset=3.0),
            [1, 2, -9, -9],
            [0.5 * sigmoid(1.0) * 3.5, -9 * sigmoid(-18) * 2.5],
        ),
        (relu2_deepep, [3, -2, 0, 0.5], [9, 0, 0, 0.25]),
    ],
    ids=["swiglu", "swiglu-limit", "gate-unclamped-below", "geglu", "swigluoai", "quick_geglu", "arguments", "relu2"],
)
def test_activations_match_numbers_computed_by_hand(
    call: Callable[[Tensor, Tensor], Tensor], x: list[float], result: list[float]
) -> None:
    found = call(torch.tensor([x], dtype=F64), torch.tensor([0.5], dtype=F64))
    torch.testing.assert_close(found, torch.tensor([result], dtype=F64) * 0.5, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_activations_are_computed_in_float32_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    x_ND, probs_N = (tensor.to(dtype) for tensor in rows(name))
    found = limited(name)(x_ND, probs_N)
    assert found.dtype is dtype
    assert found.shape == (40, INTER)
    assert_rounded_once(found, by_oracle(name, x_ND, probs_N, **LIMITS))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_rows_and_weights_have_their_dtypes(name: str, dtype: torch.dtype) -> None:
    x_ND, probs_N = rows(name)
    x_ND = x_ND.to(dtype).requires_grad_()
    probs_N = probs_N.to(accumulation_dtype(dtype)).requires_grad_()
    grad_NI = torch.randn(40, INTER, dtype=F64, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = torch.autograd.grad(limited(name)(x_ND, probs_N), (x_ND, probs_N), grad_NI)
    assert [gradient.dtype for gradient in found] == [dtype, accumulation_dtype(dtype)]
    right = torch.autograd.grad(by_oracle(name, x_ND, probs_N, **LIMITS), (x_ND, probs_N), grad_NI.double())
    for one, other in zip(found, right, strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", NAMES)
def test_routing_weights_may_have_one_or_two_dimensions(name: str) -> None:
    x_ND, probs_N = rows(name)
    assert torch.equal(activation(name)(x_ND, probs_N), activation(name)(x_ND, probs_N.unsqueeze(-1)))


@pytest.mark.parametrize("name", NAMES)
def test_float32_routing_weights_are_not_rounded_to_the_input_dtype(name: str) -> None:
    """In bfloat16, 1.0039 would be 1. The product, which is rounded once, shows the difference."""
    x_ND, _ = rows(name)
    probs_N = torch.full((40,), 1.0039, dtype=F32)
    found = activation(name)(x_ND.to(BF16), probs_N)
    assert_rounded_once(found, by_oracle(name, x_ND.to(BF16), probs_N))


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_give_no_rows(name: str) -> None:
    x_ND, probs_N = rows(name, 0)
    assert activation(name)(x_ND, probs_N).shape == (0, INTER)


@pytest.mark.parametrize("name", NAMES)
def test_rows_may_be_non_contiguous(name: str) -> None:
    x_ND, probs_N = rows(name)
    found = activation(name)(x_ND.t().contiguous().t(), probs_N.repeat_interleave(2)[::2])
    torch.testing.assert_close(found, activation(name)(x_ND, probs_N), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_an_activation_uses_only_its_own_fields_of_the_config(name: str) -> None:
    """A field changes the result of the activations that use it, and of no others."""
    fields = {"activation_alpha": 1.3, "activation_limit": 0.83, "swiglu_limit": 0.71}
    used = {
        "swiglu": {"swiglu_limit"},
        "swigluoai": {"activation_alpha", "activation_limit"},
        "quick_geglu": {"activation_alpha", "activation_limit"},
        "geglu": set(),
        "relu2": set(),
    }
    x_ND, probs_N = rows(name)
    plain = activation(name)(x_ND, probs_N)
    changed = {
        field
        for field, value in fields.items()
        if not torch.equal(activation(name, **{field: value})(x_ND, probs_N), plain)
    }
    assert changed == used[name]
    arguments = {"activation_alpha": "alpha", "activation_limit": "limit", "swiglu_limit": "swiglu_limit"}
    for field in used[name]:
        found = activation(name, **{field: fields[field]})(x_ND, probs_N)
        right = by_oracle(name, x_ND, probs_N, **{arguments[field]: fields[field]})
        torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-15)


def test_a_swiglu_limit_of_zero_does_not_clamp() -> None:
    x_ND = torch.full((1, 2), 1000.0)
    assert activation("swiglu")(x_ND, torch.ones(1)).item() == 1e6
    assert activation("swiglu", swiglu_limit=10.0)(x_ND, torch.ones(1)).item() == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize("name", ["swiglu", "swigluoai", "quick_geglu"])
def test_clamped_values_get_no_gradient(name: str) -> None:
    gate_up = [5.0, -5.0] if name == "quick_geglu" else [5.0] * INTER + [-5.0] * INTER
    x_ND = torch.tensor([gate_up * (INTER if name == "quick_geglu" else 1)], requires_grad=True)
    limited(name)(x_ND, torch.ones(1)).sum().backward()
    assert not x_ND.grad.any()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", GATED)
def test_large_negative_gates_give_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    """sigmoid and tanh saturate. Nothing becomes NaN, in forward or backward."""
    x_ND = torch.full((1, 2 * INTER), -3e4, dtype=dtype, requires_grad=True)
    found = activation(name)(x_ND, torch.ones(1))
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(x_ND.grad).all()


def test_signatures_are_those_of_nemo_automodel() -> None:
    assert str(inspect.signature(quick_geglu_deepep)).startswith("(x: torch.Tensor, permuted_probs: torch.Tensor, ")
    defaults = {
        name: p.default
        for name, p in inspect.signature(quick_geglu_deepep).parameters.items()
        if p.default is not p.empty
    }
    assert defaults == {"alpha": 1.702, "limit": 7.0, "linear_offset": 1.0}
    assert list(inspect.signature(relu2_deepep).parameters) == ["x", "permuted_probs"]
    assert list(inspect.signature(get_expert_activation_for_deepep).parameters) == ["config"]


def test_the_accumulation_dtype_is_at_least_float32() -> None:
    assert [accumulation_dtype(dtype) for dtype in (F64, F32, BF16, F16)] == [F64, F32, F32, F32]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lead", [(), (1,), (3, 1), (1, 3), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions_are_rows(name: str, lead: tuple[int, ...]) -> None:
    """The result has x's leading dimensions, and every row its own routing weight, also if its last dimension is 1."""
    x_ND, probs_N = rows(name, math.prod(lead))
    right = limited(name)(x_ND, probs_N).reshape(*lead, INTER)
    for probs in (probs_N.reshape(lead), probs_N.reshape(*lead, 1)):
        found = limited(name)(x_ND.reshape(*lead, x_ND.shape[-1]), probs)
        assert found.shape == right.shape
        assert torch.equal(found, right)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (4, 1), (3, 6), (1, 3), (3, 1, 1), ()], ids=str)
def test_routing_weights_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    """Nothing is broadcast: one weight for all rows, or one per column, is a mistake."""
    with pytest.raises(InputError, match=r"permuted_probs has shape .*, but must be \[3\] or \[3, 1\]: one routing"):
        activation(name)(rows(name, 3)[0], torch.rand(shape))


@pytest.mark.parametrize("name", GATED)
def test_an_odd_number_of_columns_is_refused(name: str) -> None:
    """With three columns, gate would have two and up one, and torch would broadcast up."""
    with pytest.raises(InputError, match="x has 3 columns, but needs an even number"):
        activation(name)(torch.rand(2, 3), torch.rand(2))
