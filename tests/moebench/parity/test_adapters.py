"""Backends with adapters are judged with adapters that change the result; weights beside them must get no gradient."""

import math

import pytest
import torch

from moebench.measure.cache import Workload
from moebench.measure.subject import make_subject
from moebench.parity import adapters
from moebench.parity.adapters import Lora, adapter_shapes, flops, lora_of, make_adapters
from moebench.parity.chance import sizes_by_chance
from moebench.parity.oracle import ADAPTER_NAMES, ADAPTERS, Formula, gradients, trained
from moebench.parity.rounding import Operands, roundings
from moebench.workload.case import Case, Job
from moebench.workload.driven import get_backend
from moebench.workload.inputs import make_parameters
from tests.backends import faulty_lora

CPU = torch.device("cpu")
LORA = Lora(rank=3, alpha=1.5)


def case(**fields):
    shape = {"num_tokens": 40, "n_routed_experts": 5, "n_activated_experts": 2, "dim": 32, "moe_inter_dim": 24}
    return Case.model_validate({**shape, "mode": "train", "dtype": "float32", "expert_bias": True, **fields})


def verdict(backend, one, passes=2):
    found = get_backend(backend)
    workload = Workload(CPU)
    subject = make_subject(found, Job(case=one, backend=backend, dispatcher="local"), workload)
    return subject.judge([subject.run(subject.inputs.clone()) for _ in range(passes)])


RIGHT = [("loop_lora", "float64"), *((f"{n}_lora", d) for n in ("loop", "torch_mm") for d in ("float32", "bfloat16"))]


@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "relu2"])
@pytest.mark.parametrize(("backend", "dtype"), RIGHT)
def test_a_right_backend_with_adapters_passes(backend, dtype, activation):
    for seed in range(2):
        one = case(dtype=dtype, expert_activation=activation, seed=seed, masked_share=0.1)
        found = verdict(backend, one)
        assert found.passed, str(found.worst)
        tensors = {"output", "x.grad", "weights.grad", *(f"{name}.grad" for name in ADAPTER_NAMES)}
        assert found.errors.keys() == tensors
        assert verdict(backend, one.model_copy(update={"mode": "forward"})).passed


@pytest.mark.parametrize("fault", faulty_lora.FAULTS, ids=lambda fault: fault.__name__)
def test_a_measured_job_finds_a_wrong_adapter(fault):
    found = verdict(f"tests.backends.faulty_lora:{fault.__name__}", case())
    assert not found.passed
    assert found.worst.tensor in faulty_lora.FAULTS[fault], str(found.worst)


def test_a_gradient_of_a_frozen_weight_is_one_that_nobody_wanted():
    worst = verdict("tests.backends.faulty_lora:TrainedWeights", case()).worst
    assert worst.over_budget == math.inf
    assert worst.where == "is a gradient that nobody wanted"


# the oracle


def operands(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    experts = {"gate_and_up_projs": normal(2, 6, 10), "down_projs": normal(2, 5, 6)}
    experts |= {"gate_up_proj_bias": normal(2, 10), "down_proj_bias": normal(2, 6)} if bias else {}
    shapes = adapter_shapes({name: tuple(tensor.shape) for name, tensor in experts.items()}, LORA.rank)
    experts |= {name: normal(*shape) for name, shape in shapes.items()}
    return Operands(normal(2, 7, 6), normal(2, 7), experts, normal(2, 7, 6))


@pytest.mark.parametrize("adds_rows", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_the_oracle_multiplies_by_weight_plus_scale_times_a_b(adds_rows, after):
    """Its gradients of the adapters are those that the chain rule gives from the gradients of the sum."""
    given = operands()
    formula = Formula("swiglu", 1.702, 2.0, after, LORA.scale, adds_rows)
    values, grads = gradients(formula, given.x_GMD, given.weights_GM, given.experts, given.grad_GMD)
    sums = {name: stacked for name, stacked in given.experts.items() if name not in ADAPTER_NAMES}
    for projection, (name_A, name_B) in ADAPTERS.items():
        sums[projection] = sums[projection] + 0.5 * torch.einsum(
            "gir,gro->gio", given.experts[name_A], given.experts[name_B]
        )
    plain = Formula("swiglu", 1.702, 2.0, after)
    right, of_sums = gradients(plain, given.x_GMD, given.weights_GM, sums, given.grad_GMD)
    expected = {name: of_sums[name] for name in ("x", "weights", "h")}
    for projection, (name_A, name_B) in ADAPTERS.items():
        expected[name_A] = 0.5 * of_sums[projection] @ given.experts[name_B].mT
        expected[name_B] = 0.5 * given.experts[name_A].mT @ of_sums[projection]
    assert grads.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(grads[name], tensor, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values.y, right.y, rtol=1e-12, atol=1e-12)


def test_the_size_by_chance_of_an_adapter_is_that_of_random_gradients():
    """With gradients of random signs, the gradient of an adapter has this size on average."""
    given, formula = operands(), Formula("swiglu", 1.702, 0.0, False, LORA.scale)
    values, grads = gradients(formula, given.x_GMD, given.weights_GM, given.experts, given.grad_GMD)
    found = sizes_by_chance(formula, given, values, grads)
    assert found.keys() == {"output", "x", "weights", *ADAPTER_NAMES}
    generator, squares = torch.Generator().manual_seed(4), 0.0
    for _ in range(4000):
        signs = torch.randint(0, 2, given.grad_GMD.shape, generator=generator).double() * 2 - 1
        rows = torch.randint(0, 2, given.experts["lora_down_B"].shape, generator=generator).double() * 2 - 1
        grad_thin = LORA.scale * (given.grad_GMD * signs) @ (given.experts["lora_down_B"] * rows).mT
        weighted = values.a * given.weights_GM.unsqueeze(-1)
        squares = squares + (weighted.mT @ grad_thin).square().sum((1, 2)) / 4000
    # an activation in its tail counts for more
    assert (found["lora_down_A"] > 0.9 * squares.sqrt()).all()
    assert (found["lora_down_A"] < 1.5 * squares.sqrt()).all()


def test_rounding_shows_both_places_where_adapters_may_be_added():
    plain, added, *perturbed = roundings(Formula("swiglu", 1.7, 0.0, False, 2.0), torch.bfloat16, torch.matmul, 2, 64)
    assert (plain.formula.adds_rows, added.formula.adds_rows) == (False, True)
    assert plain.dtype is added.dtype is torch.bfloat16
    assert len(perturbed) == 2
    without = roundings(Formula("swiglu", 1.7, 0.0, False), torch.bfloat16, torch.matmul, 2, 64)
    assert len(without) == 3


# what is drawn and counted


def test_drawn_adapters_change_the_result_and_differ_between_ranks():
    one = case(expert_activation="quick_geglu")
    weights = make_parameters(one, CPU)
    drawn, other = (make_adapters(one, LORA, weights, rank) for rank in (0, 1))
    assert {name: tuple(tensor.shape) for name, tensor in drawn.items()} == {
        "lora_gate_and_up_A": (5, 32, 3),
        "lora_gate_and_up_B": (5, 3, 48),
        "lora_down_A": (5, 24, 3),
        "lora_down_B": (5, 3, 32),
    }
    for projection, (name_A, name_B) in ADAPTERS.items():
        added = LORA.scale * drawn[name_A] @ drawn[name_B]
        assert (added.std() / weights[projection].std()).item() == pytest.approx(adapters.ADDED_STD, rel=0.25)
        assert not torch.equal(drawn[name_B], other[name_B])


def test_adapters_are_trained_if_there_are_any():
    assert trained(("a", "lora_down_A", "lora_down_B")) == ("lora_down_A", "lora_down_B")
    assert trained(("gate_and_up_projs", "down_projs")) == ("gate_and_up_projs", "down_projs")


def test_the_size_of_adapters_is_the_backends():
    assert lora_of(get_backend("torch_mm_lora")) == Lora(16, 32.0)
    assert lora_of(get_backend("tests.backends.faulty_lora:InertAdapters")) == Lora(16, 32.0)
    assert lora_of(get_backend("torch_mm")) is None
    assert LORA.scale == 0.5


def test_operations_of_a_step_that_trains_adapters():
    """Per row: 2·dim·width and 2·inter·dim for the projections, and 2·rank times each side for the adapters."""
    rows, up, down = 40 * 2, 2 * 32 * 48, 2 * 24 * 32
    thin = 2 * 3 * (32 + 48) + 2 * 3 * (24 + 32)
    forward, train = case(mode="forward"), case()
    assert flops(forward, None) == rows * (up + down)
    assert flops(forward, LORA) == rows * (up + down + thin)
    assert flops(train, None) == 3 * rows * (up + down)
    assert flops(train, LORA) == pytest.approx(rows * (2 * (up + down) + 3 * thin))
