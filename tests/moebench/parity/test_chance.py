"""The size by chance: where terms cancel it stays, and elsewhere it is what the sum of random terms is."""

import math

import pytest
import torch

from moebench.parity.chance import TAIL, sizes_by_chance
from moebench.parity.oracle import Formula, gradients
from moebench.parity.rounding import Operands

LINEAR = Formula("relu2", 1.702, 0.0, False)


def sizes(formula, x, weights, experts, grad):
    operands = Operands(*(torch.tensor(one, dtype=torch.float64) for one in (x, weights)), {
        name: torch.tensor(stacked, dtype=torch.float64) for name, stacked in experts.items()
    }, torch.tensor(grad, dtype=torch.float64))  # fmt: skip
    values, grads = gradients(formula, operands.x_GMD, operands.weights_GM, operands.experts, operands.grad_GMD)
    return values, grads, sizes_by_chance(formula, operands, values, grads)


EXPERTS = {"gate_and_up_projs": [[[1.0, 1.0]]], "down_projs": [[[1.0], [-1.0]]]}


def test_an_output_that_cancels_has_the_size_of_its_terms():
    """relu(2)² − relu(2)² is 0, and its terms are 4 and −4."""
    values, _, found = sizes(LINEAR, [[[2.0]]], [[1.0]], EXPERTS, [[[1.0]]])
    assert values.y.item() == 0
    assert math.sqrt(found["output"].item()) == pytest.approx(math.sqrt(4**2 + 4**2))


def test_a_bias_gradient_that_cancels_has_the_size_of_its_rows():
    """Four rows with gradients 1, 1, −1 and −1 add up to 0. By chance their sum would have the size 2."""
    experts = EXPERTS | {"down_proj_bias": [[0.5]], "gate_up_proj_bias": [[0.0, 0.0]]}
    x, grad = [[[2.0]] * 4], [[[1.0], [1.0], [-1.0], [-1.0]]]
    _, grads, found = sizes(LINEAR, x, [[1.0] * 4], experts, grad)
    assert grads["down_proj_bias"].item() == 0
    assert found["down_proj_bias"].item() == pytest.approx(2)
    assert found.keys() == {"output", "x", "weights", *experts}


def test_routing_weights_scale_every_size_but_their_own():
    once = sizes(LINEAR, [[[2.0]]], [[1.0]], EXPERTS, [[[1.0]]])[2]
    thrice = sizes(LINEAR, [[[2.0]]], [[3.0]], EXPERTS, [[[1.0]]])[2]
    for name, factor in (("output", 9), ("x", 9), ("weights", 1), ("down_projs", 3), ("gate_and_up_projs", 3)):
        assert thrice[name].item() == pytest.approx(factor * once[name].item()), name


def test_an_activation_in_its_tail_counts_as_a_share_of_gate_times_up():
    """silu(−40) is 1e-16. A right formula such as 0.5·g·(1 + tanh(g/2)) gives exactly zero there."""
    swiglu = Formula("swiglu", 1.702, 0.0, False)
    experts = {"gate_and_up_projs": [[[1.0, 1.0]]], "down_projs": [[[1.0]]]}
    _, _, found = sizes(swiglu, [[[-40.0]]], [[1.0]], experts, [[[1.0]]])
    assert math.sqrt(found["output"].item()) == pytest.approx(TAIL * 40 * 40)


def test_without_a_backward_only_the_output_has_a_size():
    x, weights = torch.ones(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    experts = {name: torch.tensor(stacked, dtype=torch.float64) for name, stacked in EXPERTS.items()}
    operands = Operands(x, weights, experts, x)
    values, _ = gradients(LINEAR, x, weights, experts, x)
    assert sizes_by_chance(LINEAR, operands, values, {}).keys() == {"output"}
