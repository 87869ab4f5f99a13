"""The runs that show what rounding costs: which there are, and how far they change their operands."""

import pytest
import torch

from moebench.parity.oracle import Formula
from moebench.parity.quantization import fp8_product, rows_in_fp8
from moebench.parity.rounding import LIMIT_UNITS, REFERENCE_ROUNDS, Operands, roundings

FORMULA = Formula("swiglu", 1.702, 2.0, False)
#: Half of the rounding unit of the dtypes of 16 bits, the whole unit of float32.
UNITS = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-24}


def drawn() -> Operands:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    experts = {"gate_and_up_projs": draw(2, 8, 6), "down_projs": draw(2, 3, 8)}
    return Operands(draw(2, 40, 8), draw(2, 40).abs().float(), experts, draw(2, 40, 8))


@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_a_dtype_has_one_plain_run_and_runs_that_change_operands_by_its_share_of_a_unit(dtype):
    plain, *perturbed = roundings(FORMULA, dtype, torch.matmul, 3, longest=0)
    assert (plain.dtype, plain.unit, plain.share) == (dtype, 0.0, 1.0)
    assert len(perturbed) == 3
    for number, run in enumerate(perturbed):
        assert run.unit == UNITS[dtype]
        assert torch.finfo(run.dtype).eps < torch.finfo(dtype).eps
        sign = -1 if number % 2 == 0 else 1
        assert run.formula.limit == pytest.approx(2.0 * (1 + sign * LIMIT_UNITS * UNITS[dtype]), rel=1e-12)


@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_long_sums_change_operands_by_more(dtype):
    """Sums of all these dtypes run in float32."""
    run = roundings(FORMULA, dtype, torch.matmul, 1, longest=400)[1]
    assert run.unit == UNITS[dtype] + 10 * 2.0**-24


def test_float64_has_no_plain_run_because_that_is_the_reference():
    runs = roundings(FORMULA, torch.float64, torch.matmul, 2, longest=0)
    assert len(runs) == 2
    for run in runs:
        assert (run.dtype, run.unit) == (torch.float64, UNITS[torch.float32])
        assert run.share * run.unit == pytest.approx(REFERENCE_ROUNDS * 2.0**-53)


def test_rows_that_travel_in_fp8_are_rounded_before_the_products():
    """Tokens and the output's gradients are, in blocks of a row each; weights are not."""
    exact, travel = drawn(), rows_in_fp8("block_float32_rows")
    (run,) = roundings(FORMULA, torch.bfloat16, fp8_product("block_float32_rows"), 5, 0, travel)
    found = run.operands(exact, torch.Generator())
    for name in ("x_GMD", "grad_GMD"):
        rows = getattr(exact, name).to(torch.bfloat16)
        scale = 448 / rows.float().abs().amax(dim=2, keepdim=True)
        right = ((rows.float() * scale).to(torch.float8_e4m3fn).float() / scale).to(torch.bfloat16)
        assert torch.equal(getattr(found, name), right)
        assert not torch.equal(right, rows)
    plain = roundings(FORMULA, torch.bfloat16, fp8_product("block_float32"), 5, 0)[0].operands(exact, torch.Generator())
    assert torch.equal(plain.x_GMD, exact.x_GMD.to(torch.bfloat16))
    assert all(torch.equal(found.experts[name], tensor) for name, tensor in plain.experts.items())
    assert rows_in_fp8("block_float32") is rows_in_fp8(None) is None


def test_fp8_has_the_plain_run_alone():
    (run,) = roundings(FORMULA, torch.bfloat16, fp8_product("current"), 5, longest=0)
    assert (run.dtype, run.unit, run.formula) == (torch.bfloat16, 0.0, FORMULA)


@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_operands_change_by_at_most_that_and_usually_by_half_of_it(dtype):
    exact, unit = drawn(), UNITS[dtype]
    run = roundings(FORMULA, dtype, torch.matmul, 1, longest=0)[1]
    found = run.operands(exact, torch.Generator().manual_seed(1))
    pairs = [(found.x_GMD, exact.x_GMD), (found.grad_GMD, exact.grad_GMD)]
    pairs += [(found.experts[name], stacked) for name, stacked in exact.experts.items()]
    rounds = torch.finfo(run.dtype).eps
    for changed, before in pairs:
        relative = ((changed.double() - before) / before).abs()
        assert float(relative.max()) <= unit + rounds
        assert 0.3 * unit < float(relative.mean()) < 0.7 * unit + rounds


def test_the_plain_run_rounds_operands_and_leaves_routing_weights_wide():
    exact = drawn()
    found = roundings(FORMULA, torch.bfloat16, torch.matmul, 1, longest=0)[0].operands(exact, torch.Generator())
    assert torch.equal(found.x_GMD, exact.x_GMD.bfloat16())
    assert torch.equal(found.weights_GM, exact.weights_GM)
    assert found.weights_GM.dtype is torch.float32


def test_routing_weights_move_by_the_unit_of_their_own_dtype_if_it_is_coarser():
    """A layer may add up the weights of a token that chose one expert twice in the weights' dtype."""
    exact = drawn()
    exact = Operands(exact.x_GMD, exact.weights_GM.bfloat16(), exact.experts, exact.grad_GMD)
    run = roundings(FORMULA, torch.float32, torch.matmul, 1, longest=0)[1]
    found = run.operands(exact, torch.Generator().manual_seed(1)).weights_GM
    relative = ((found.double() - exact.weights_GM.double()) / exact.weights_GM.double()).abs()
    assert 2.0**-10 < float(relative.max()) <= 2.0**-8 * 1.001
