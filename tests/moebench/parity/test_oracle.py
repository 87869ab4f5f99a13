"""Compare the oracle with formulas written for one number at a time, which only use Python's `math`."""

import ast
import math
from pathlib import Path

import pytest
import torch

from moebench.parity import oracle
from moebench.parity.oracle import Formula, activation, arguments, experts_values, gradients, wide
from moebench.workload.case import ACTIVATIONS, Case

INTER, DIM, EXPERTS, ROWS = 3, 4, 2, 5
#: Gates and ups on both sides of every limit below, in the tails of the activations, and zero.
VALUES = (-30.0, -7.5, -1.25, -0.3, 0.0, 0.2, 0.75, 1.5, 6.5, 9.0, 40.0)


def glu(formula: Formula, gate: float, up: float) -> float:
    """Return the gated activation of one gate and one up."""
    if formula.limit and formula.activation != "geglu":
        gate, up = min(gate, formula.limit), max(-formula.limit, min(up, formula.limit))
    match formula.activation:
        case "swiglu":
            return gate / (1 + math.exp(-gate)) * up
        case "geglu":
            return 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
        case _:
            return gate / (1 + math.exp(-formula.alpha * gate)) * (up + 1)


def scalar_activation(formula: Formula, h: list[float]) -> list[float]:
    if formula.activation == "relu2":
        return [max(value, 0.0) ** 2 for value in h]
    inter = len(h) // 2
    if formula.activation == "quick_geglu":
        return [glu(formula, h[2 * i], h[2 * i + 1]) for i in range(inter)]
    return [glu(formula, h[i], h[inter + i]) for i in range(inter)]


FORMULAS = [Formula(name, 1.702, 0.0, False) for name in ("swiglu", "geglu", "relu2")] + [
    Formula("swiglu", 1.702, 1.0, False),
    Formula("swigluoai", 1.702, 7.0, False),
    Formula("swigluoai", 0.3, 0.5, False),
    Formula("quick_geglu", 1.702, 7.0, False),
    Formula("quick_geglu", 0.3, 0.5, False),
]


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_an_activation_is_its_formula(formula):
    pairs = [[gate, up] for gate in VALUES for up in VALUES]
    rows = [[value, -value] for value in VALUES] if formula.activation == "relu2" else pairs
    right = torch.tensor([scalar_activation(formula, row) for row in rows], dtype=torch.float64)
    found = activation(formula, torch.tensor(rows, dtype=torch.float64))
    torch.testing.assert_close(found, right, rtol=1e-14, atol=1e-300)


def test_gate_and_up_are_halves_or_alternate():
    h = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert [one.tolist() for one in arguments(Formula("swiglu", 1.702, 0.0, False), h)] == [[[1, 2]], [[3, 4]]]
    assert [one.tolist() for one in arguments(Formula("quick_geglu", 1.702, 9.0, False), h)] == [[[1, 3]], [[3, 5]]]


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_the_slope_of_an_activation_is_its_difference_quotient(formula):
    """Central differences of the scalar formula, away from the limits, where the slope jumps."""
    width = INTER if formula.activation == "relu2" else 2 * INTER
    h = torch.linspace(-1.9, 2.3, width, dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(activation(formula, h).sum(), h)
    step = 1e-6
    for i in range(width):
        sides = []
        for sign in (1, -1):
            moved = h.detach().tolist()
            moved[i] += sign * step
            sides.append(sum(scalar_activation(formula, moved)))
        assert float(found[i]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-7, abs=1e-8)


def drawn(formula: Formula, bias: bool):
    """Return x [G, M, D], routing weights [G, M], the experts' parameters and a gradient of the output."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = INTER if formula.activation == "relu2" else 2 * INTER
    experts = {"gate_and_up_projs": draw(EXPERTS, DIM, width), "down_projs": draw(EXPERTS, INTER, DIM)}
    if bias:
        experts |= {"gate_up_proj_bias": draw(EXPERTS, width), "down_proj_bias": draw(EXPERTS, DIM)}
    return draw(EXPERTS, ROWS, DIM), draw(EXPERTS, ROWS), experts, draw(EXPERTS, ROWS, DIM)


def scalar_row(formula: Formula, x: list[float], weight: float, expert: dict[str, list]) -> list[float]:
    """Return what an expert adds to one row, one multiplication at a time."""
    up, down = expert["gate_and_up_projs"], expert["down_projs"]
    h = [sum(x[d] * up[d][j] for d in range(DIM)) for j in range(len(up[0]))]
    if "gate_up_proj_bias" in expert:
        h = [value + bias for value, bias in zip(h, expert["gate_up_proj_bias"], strict=True)]
    a = scalar_activation(formula, h)
    y = [sum(a[i] * down[i][d] for i in range(INTER)) for d in range(DIM)]
    if "down_proj_bias" in expert:
        y = [value + bias for value, bias in zip(y, expert["down_proj_bias"], strict=True)]
    return [weight * value for value in y]


@pytest.mark.parametrize("weight_after_down", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_row_is_the_formulas_of_its_expert(name, bias, weight_after_down):
    """The weight multiplies the bias of the second projection too, whether it comes before the projection or after."""
    formula = Formula(name, 1.702, 0.0 if name in ("geglu", "relu2") else 0.7, weight_after_down)
    x, weights, experts, grad = drawn(formula, bias)
    found = experts_values(formula, x, weights, experts).y
    for g in range(EXPERTS):
        own = {key: value[g].tolist() for key, value in experts.items()}
        for m in range(ROWS):
            right = torch.tensor(scalar_row(formula, x[g, m].tolist(), float(weights[g, m]), own), dtype=torch.float64)
            torch.testing.assert_close(found[g, m], right, rtol=1e-12, atol=1e-12)
    values, grads = gradients(formula, x, weights, experts, grad)
    assert torch.equal(values.y, found)
    assert grads.keys() == {"x", "weights", "h", *experts}
    (g, m), step = (1, 2), 1e-6  # the gradient of one routing weight, by differences of the scalar formula
    own = {key: value[g].tolist() for key, value in experts.items()}
    sides = [
        sum(
            one * float(dy)
            for one, dy in zip(
                scalar_row(formula, x[g, m].tolist(), float(weights[g, m]) + sign * step, own), grad[g, m], strict=True
            )
        )
        for sign in (1, -1)
    ]
    assert float(grads["weights"][g, m]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6)


def test_the_formula_of_a_case_has_the_limit_of_its_activation():
    limits = {"activation_limit": 3.0, "swiglu_limit": 2.0, "activation_alpha": 0.3}
    for name, limit in (("swiglu", 2.0), ("swigluoai", 3.0), ("quick_geglu", 3.0), ("geglu", 0.0), ("relu2", 0.0)):
        one = Case(num_tokens=1, n_routed_experts=1, n_activated_experts=1, dim=1, moe_inter_dim=1, mode="train",
                   dtype="float32", expert_activation=name, apply_router_weight_after_down=True, **limits)  # fmt: skip
        assert Formula.of(one) == Formula(name, 0.3, limit, True)


def test_sums_and_activations_are_in_float32_or_float64():
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    assert [wide(dtype) for dtype in dtypes] == [torch.float64, *[torch.float32] * 3]
    formula = Formula("swiglu", 1.702, 0.0, False)
    x, weights, experts, _ = drawn(formula, True)
    low = {name: tensor.bfloat16() for name, tensor in experts.items()}
    values = experts_values(formula, x.bfloat16(), weights, low)
    assert (values.h.dtype, values.a.dtype, values.y.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_a_negative_value_that_relu_removes_may_be_infinite_only_in_its_own_place():
    found = activation(Formula("relu2", 1.702, 0.0, False), torch.tensor([[-1.0, 2.0, math.nan]]))
    assert found[0, :2].tolist() == [0, 4]
    assert found[0, 2].isnan()


def test_the_oracle_imports_nothing_of_the_code_that_it_judges():
    tree = ast.parse(Path(oracle.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"math", "collections.abc", "dataclasses", "torch", "moebench.workload.case"}
