"""Right backends pass, in every dtype and with every seed.

Nothing wrong passes: not zeros, not NaN, not one wrong row.
"""

import contextlib
import dataclasses
import math

import pytest
import torch

from experts import GroupedExperts
from experts.registry import get_backend
from moebench.parity.judge import CEILING, ParityVerdict, TensorError, Unfit, are_identical, check, judge
from moebench.parity.passes import run_pass
from moebench.parity.reference import GroupErrors
from moebench.workload.case import ACTIVATIONS, Case
from moebench.workload.inputs import make_inputs, make_parameters, moe_config
from tests.backends import coarse, faulty

CPU = torch.device("cpu")
FLOOR = 1e-7


def case(**fields):
    shape = {"num_tokens": 48, "n_routed_experts": 6, "n_activated_experts": 2, "dim": 64, "moe_inter_dim": 32}
    return Case.model_validate({**shape, "mode": "train", "expert_bias": True, "masked_share": 0.1, **fields})


def layer(one, build=None):
    parameters = make_parameters(one, CPU)
    module = (build or get_backend("loop").build)(moe_config(one))
    module.load_state_dict(parameters)
    return module, make_inputs(one, CPU), parameters


def passes(one, build=None):
    """Run two passes of a backend on a case; return them with the inputs and parameters to check them against."""
    module, inputs, parameters = layer(one, build)
    return [run_pass(module, inputs, one.mode) for _ in range(2)], inputs, parameters


def verdict(one, build=None):
    tensors, inputs, parameters = passes(one, build)
    return check(one, inputs, parameters, tensors)


RIGHT = [("loop", "float64"), *((name, d) for name in ("loop", "torch_mm") for d in ("float32", "bfloat16", "float16"))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("backend", "dtype"), RIGHT)
def test_a_right_backend_passes(backend, dtype, activation):
    for seed in range(3):
        one = case(dtype=dtype, expert_activation=activation, seed=seed)
        found = verdict(one, get_backend(backend).build)
        assert found.passed, str(found.worst)


@pytest.mark.parametrize("fields", [{"swiglu_limit": 1.0}, {"apply_router_weight_after_down": True}], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), RIGHT)
def test_a_right_backend_passes_in_other_forms(backend, dtype, fields):
    """In bfloat16, x's gradient jumps at so many limits that it must only be finite; `partly` allows that."""
    one = case(dtype=dtype, **fields)
    tensors, inputs, parameters = passes(one, get_backend(backend).build)
    found = check(one, inputs, parameters, tensors, partly=True)
    assert found.passed, str(found.worst)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_expert_scaled_by_1_02_fails(dtype):
    for seed in range(5):
        found = verdict(case(dtype=dtype, seed=seed), faulty.ScaledExpert)
        assert not found.passed
        if dtype != "bfloat16":  # the budget of bfloat16 is about 2%
            assert found.errors["down_projs.grad"] > 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tensor", ["output", "x.grad", "weights.grad", "down_projs.grad", "down_proj_bias.grad"])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_tensor_of_zeros_or_of_no_numbers_never_passes(dtype, tensor, value):
    one = case(dtype=dtype)
    tensors, inputs, parameters = passes(one)
    assert check(one, inputs, parameters, tensors).passed
    tensors[1][tensor] = torch.full_like(tensors[1][tensor], value)
    found = check(one, inputs, parameters, tensors)
    assert not found.passed
    assert found.worst.tensor == tensor
    assert (found.worst.error == math.inf) == (value != 0)


@pytest.mark.parametrize("tensor", ["output", "x.grad", "weights.grad"])
def test_a_masked_token_must_be_exactly_zero(tensor):
    one = case(dtype="bfloat16")
    tensors, inputs, parameters = passes(one)
    masked = int((~inputs.token_mask_T).nonzero()[1])
    tensors[0][tensor][masked, 0] = 1e-30
    found = check(one, inputs, parameters, tensors).worst
    assert (found.tensor, found.where, found.error) == (tensor, f"token {masked}", math.inf)


@pytest.mark.parametrize("name", ["gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"])
def test_the_gradient_of_an_expert_without_tokens_must_be_exactly_zero(name):
    one = case(dtype="float32", routing="one-hot")
    tensors, inputs, parameters = passes(one)
    empty = next(e for e in range(6) if not (inputs.indices_TK == e).any())
    tensors[1][f"{name}.grad"][empty].view(-1)[-1] = 1e-30
    found = check(one, inputs, parameters, tensors).worst
    assert (found.tensor, found.where, found.error) == (f"{name}.grad", f"expert {empty}", math.inf)


@pytest.mark.parametrize("name", ["x", "weights", "down_projs", "gate_up_proj_bias"])
def test_a_gradient_that_is_missing_or_of_another_kind_fails(name):
    one = case(dtype="bfloat16")
    wrong = {
        "is None": None,
        "is torch.float64 ": lambda grad: grad.double(),
        "is torch.": lambda grad: grad[:-1],
    }
    for message, change in wrong.items():
        tensors, inputs, parameters = passes(one)
        right = tensors[1].pop(f"{name}.grad")
        if change is not None:
            tensors[1][f"{name}.grad"] = change(right)
        found = check(one, inputs, parameters, tensors)
        assert not found.passed
        assert (found.worst.tensor, found.worst.error) == (f"{name}.grad", math.inf)
        assert found.worst.where.startswith(message)


def test_an_output_of_another_dtype_fails():
    one = case(dtype="bfloat16", mode="forward")
    tensors, inputs, parameters = passes(one)
    tensors[0]["output"] = tensors[0]["output"].float()
    found = check(one, inputs, parameters, tensors).worst
    assert (found.tensor, found.where) == ("output", "is torch.float32 [48, 64] instead of torch.bfloat16 [48, 64]")


def test_every_pass_counts():
    """A buffer is often clean the first time. So the first pass may be right and the second wrong, or the reverse."""
    one = case(dtype="float32")
    for wrong in (0, 1):
        tensors, inputs, parameters = passes(one)
        tensors[wrong]["output"] = tensors[wrong]["output"] * 1.001
        assert not check(one, inputs, parameters, tensors).passed


def test_every_tensor_is_in_the_verdict():
    errors = verdict(case(dtype="float32")).errors
    names = ("x", "weights", "gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias")
    assert errors.keys() == {"output", *(f"{name}.grad" for name in names)}
    assert verdict(case(dtype="float32", mode="forward")).errors.keys() == {"output"}


def test_a_verdict_is_its_worst_error():
    right, wrong = TensorError("output", "token 3", 0.01, 0.02), TensorError("x.grad", "whole tensor", 0.03, 0.02)
    assert ParityVerdict((right,)).passed
    assert not ParityVerdict((right, wrong)).passed
    assert ParityVerdict((wrong, right)).worst is wrong
    assert str(right) == "output (token 3): error 0.01, budget 0.02"
    assert not ParityVerdict((right, TensorError("output", "token 0", math.inf, 0.02))).passed


# cases that are at fault


@pytest.mark.parametrize("limit", [0.001, 300.0])
def test_a_limit_accuses_nobody_in_float16(limit):
    """A right layer passes, or the case is unfit: its values vanish in float16's rounding, or overflow."""
    with contextlib.suppress(Unfit):
        found = verdict(case(dtype="float16", swiglu_limit=limit))
        assert found.passed, str(found.worst)


def test_a_case_that_overflows_is_unfit_and_not_wrong():
    one = case(dtype="float16", expert_activation="relu2")
    tensors, inputs, parameters = passes(one)
    large = dataclasses.replace(inputs, x_TD=inputs.x_TD * 1000)
    with pytest.raises(Unfit, match=r"float16 cannot hold this case: .* overflows"):
        check(one, large, parameters, tensors)


# other orders of sums


def test_float64_may_be_summed_in_another_order():
    for seed in range(3):
        assert verdict(case(dtype="float64", seed=seed), coarse.BackToFront).passed


def test_sixteen_experts_of_a_token_may_be_summed_in_float16():
    one = case(dtype="float16", n_routed_experts=16, n_activated_experts=16, dim=8, moe_inter_dim=8)
    found = verdict(one, coarse.SumInDtype)
    assert found.passed, str(found.worst)


class SerialBias(GroupedExperts):
    """The gradients of the second bias are added up row by row in float32."""

    def stacked_grads(self):
        grads = super().stacked_grads()
        total = torch.zeros_like(grads["down_proj_bias"][0])
        for row in self.weighted_grad_TD:
            total = total + row
        return {**grads, "down_proj_bias": total.unsqueeze(0)}


def test_a_cancelling_bias_gradient_that_was_summed_row_by_row_is_seen():
    """Half of the 4,096 rows have the gradient 1, and half −1; the running sum grows to 2,000 in between."""
    one = case(dtype="float32", num_tokens=4096, n_routed_experts=1, n_activated_experts=1, dim=4, moe_inter_dim=4,
               masked_share=0.0)  # fmt: skip
    module, inputs, parameters = layer(one, SerialBias)
    grad_TD = torch.ones_like(inputs.grad_TD)
    grad_TD[2048:] = -1
    weights_TK = torch.where(grad_TD[:, :1] > 0, 1.0, 0.9999)
    inputs = dataclasses.replace(inputs, grad_TD=grad_TD, weights_TK=weights_TK)
    module.weighted_grad_TD = grad_TD * inputs.weights_TK
    found = check(one, inputs, parameters, [run_pass(module, inputs, "train")])
    assert (found.passed, found.worst.tensor) == (False, "down_proj_bias.grad")
    right, *_ = layer(one)
    assert check(one, inputs, parameters, [run_pass(right, inputs, "train")]).passed


# are_identical: bit by bit


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (torch.tensor([1.0, 0.0, math.nan]), True),
        (torch.tensor([1.0, -0.0, math.nan]), False),
        (torch.tensor([1.0 + 1e-7, 0.0, math.nan]), False),
        (torch.tensor([1.0, 0.0, math.nan]).double(), False),
        (torch.tensor([1.0, 0.0]), False),
        (torch.tensor([1.0, 0.0, math.nan]).view(3, 1), False),
        (torch.tensor([[1.0, 0.0, math.nan], [0, 0, 0]]).t()[:, 0], True),
    ],
)
def test_passes_are_identical_where_every_bit_is(other, same):
    first = {"output": torch.tensor([1.0, 0.0, math.nan])}
    assert are_identical([first, {"output": other}]) is same
    assert are_identical([first, first, {"output": other}]) is same
    assert not are_identical([first, {}])


# judge: from norms to an error


def norms(num_groups=10_000, *, scale=1.0, loop=1e-7, error=1e-7):
    """Return errors of two passes in which all groups are alike; a test then changes one group."""
    ones = torch.ones(num_groups, dtype=torch.float64)
    return GroupErrors("output", "token", scale * ones, loop * ones, (error * ones).repeat(2, 1))


def test_errors_like_the_loops_own_pass():
    found = judge(norms(), FLOOR)
    assert found.over_budget <= 1
    assert found.budget == pytest.approx(3e-7)


def test_one_wrong_row_of_ten_thousand_fails_though_the_whole_tensor_would_pass():
    errors = norms()
    errors.passes_PG[1, 1234] = 2e-6
    found = judge(errors, FLOOR)
    assert (found.where, found.error, found.over_budget > 1) == ("token 1234", pytest.approx(2e-6), True)
    whole = torch.linalg.vector_norm(errors.passes_PG[1]) / 100  # the norm of 10,000 rows of norm 1
    assert whole < 3e-7


def test_many_rows_slightly_wrong_fail_as_a_whole_though_each_row_would_pass():
    """The loop's worst row sets the budget of rows, but rounding does not cause such an error in all rows."""
    errors = norms()
    errors.rounding_G[7] = 1e-6
    errors.passes_PG[0] = 1e-6
    found = judge(errors, FLOOR)
    assert (found.where, found.over_budget > 1) == ("whole tensor", True)


def test_a_budget_is_never_below_the_floor():
    """A right backend may round where the loop happens to be exact."""
    assert judge(norms(loop=0.0), FLOOR).budget == FLOOR
    assert judge(norms(loop=0.0), FLOOR).over_budget <= 1
    assert judge(norms(loop=0.0, error=2e-7), FLOOR).over_budget == pytest.approx(2)


@pytest.mark.parametrize("loop", [0.2, 0.4, 1.0, math.inf, math.nan])
def test_zeros_do_not_pass_however_wrong_the_loop_is(loop):
    """The error of zeros is 1."""
    found = judge(norms(loop=loop, error=1.0), FLOOR)
    assert found.over_budget > 1
    assert found.budget <= CEILING


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_one_value_that_is_no_number_is_infinitely_wrong(error):
    for pass_, group in ((0, 0), (1, 9_999)):
        errors = norms()
        errors.passes_PG[pass_, group] = error
        found = judge(errors, FLOOR)
        assert (found.where, found.error) == (f"token {group}", math.inf)


def test_what_must_be_zero_has_no_budget():
    errors = norms()
    errors.scale_G[5] = errors.rounding_G[5] = errors.passes_PG[:, 5] = 0.0
    assert judge(errors, FLOOR).over_budget <= 1
    errors.passes_PG[0, 5] = 1e-300
    assert (judge(errors, FLOOR).where, judge(errors, FLOOR).error) == ("token 5", math.inf)


def test_no_groups_and_nothing_but_zeros_pass():
    assert judge(norms(0), FLOOR).over_budget == 0
    assert judge(norms(scale=0.0, loop=0.0, error=0.0), FLOOR).over_budget == 0


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_passes_are_independent(mode):
    """A pass does not add its gradients to the last pass's, and leaves none on the module or the inputs."""
    one = case(dtype="float64", mode=mode)
    module, inputs, _ = layer(one)
    first, second = (run_pass(module, inputs, mode) for _ in range(2))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0)
        assert not first[name].requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not inputs.x_TD.requires_grad
    assert inputs.x_TD.grad is None
