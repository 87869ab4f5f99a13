"""FP8 budgets: a backend that rounds as its recipe does passes with margin, and no fault hides behind that rounding."""

import math

import pytest
import torch

from experts.registry import Backend
from moebench.measure import ceilings, subject
from moebench.measure import job as job_module
from moebench.measure.cache import Workload
from moebench.measure.timing import TimingPolicy
from moebench.parity.judge import FP8_UNIT, check
from moebench.parity.passes import run_pass
from moebench.parity.quantization import fp8_product
from moebench.parity.reference import group_errors
from moebench.workload.case import Case, Job
from moebench.workload.inputs import Inputs, make_inputs, make_parameters, moe_config
from tests.backends import fp8
from tests.backends.fp8 import FAULTS, FORWARD_IS_RIGHT, faulty

CPU = torch.device("cpu")
#: The most error over budget of right experts: the budget is three times the loop's error, which is the same rounding.
MARGIN = 0.6


def case(**fields):
    shape = {"num_tokens": 48, "n_routed_experts": 8, "n_activated_experts": 2, "dim": 128, "moe_inter_dim": 128}
    return Case.model_validate({**shape, "mode": "train", **fields})


def passes(one, build):
    """Run one pass of a backend on a case; return it with the inputs and parameters to check it against."""
    inputs, parameters = make_inputs(one, CPU), make_parameters(one, CPU)
    module = build(moe_config(one))
    module.load_state_dict(parameters)
    return [run_pass(module, inputs, one.mode)], inputs, parameters


def verdict(one, build):
    tensors, inputs, parameters = passes(one, build)
    return check(one, inputs, parameters, tensors, build.fp8)


# A clamp's gradient jumps at its limit, and rounding carries some values over it.
# One such value is a large part of a narrow row.
WIDE = {"moe_inter_dim": 512, "expert_bias": True}
FORMS = {
    "swiglu": {},
    "swiglu, bias": {"expert_bias": True},
    "swiglu, clamped": {"swiglu_limit": 2.0, "moe_inter_dim": 512},
    "swigluoai": {"expert_activation": "swigluoai", **WIDE},
    "quick_geglu": {"expert_activation": "quick_geglu", **WIDE},
    "geglu": {"expert_activation": "geglu", "expert_bias": True},
    "relu2": {"expert_activation": "relu2", "expert_bias": True},
    "weight after down": {"apply_router_weight_after_down": True, "expert_bias": True},
    "wide, edge blocks": {"dim": 208, "moe_inter_dim": 80},
    "narrow": {"dim": 64, "moe_inter_dim": 320},
    "one token": {"num_tokens": 1},
    "few tokens, clamped": {"num_tokens": 4, "expert_activation": "quick_geglu", "expert_bias": True},
    "many tokens": {"num_tokens": 320},
    "zipf": {"routing": "zipf", "n_routed_experts": 16, "n_activated_experts": 4},
    "masked": {"masked_share": 0.4},
    "every expert": {"n_activated_experts": 8},
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
}
DRAWS = (("train", 0), ("train", 1), ("forward", 2))


@pytest.mark.certify(share=0.25)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [fp8.Current, fp8.Block])
def test_what_rounds_as_its_recipe_does_passes_with_margin(build, form):
    for mode, seed in DRAWS:
        found = verdict(case(mode=mode, seed=seed, **FORMS[form]), build)
        assert found.worst.over_budget <= MARGIN, str(found.worst)


@pytest.mark.certify(share=0.25)
@pytest.mark.parametrize("form", FORMS)
def test_what_rounds_alike_but_to_other_values_passes_too(form):
    for mode, seed in DRAWS:
        found = verdict(case(mode=mode, seed=seed, **FORMS[form]), fp8.Delayed)
        assert found.passed, str(found.worst)


@pytest.mark.parametrize("build", [fp8.Current, fp8.Block])
def test_without_the_recipes_name_fp8_is_a_mismatch(build):
    """bfloat16's budget has no room for FP8 rounding, so a backend that computes in FP8 must declare it."""
    one = case()
    tensors, inputs, parameters = passes(one, build)
    assert check(one, inputs, parameters, tensors).worst.over_budget > 3


def test_block_scaling_has_to_be_as_good_as_block_scaling():
    """Gradients in E5M2 are twice as wrong as gradients in E4M3, but that is within a budget of three times."""
    one = case(dim=256, moe_inter_dim=256, num_tokens=96)
    tensors, inputs, parameters = passes(one, fp8.Current)
    as_block, as_current = (check(one, inputs, parameters, tensors, recipe).errors for recipe in ("block", "current"))
    for name in ("x.grad", "gate_and_up_projs.grad", "down_projs.grad"):
        assert as_block[name] > 1.2 * as_current[name]


# faults

#: The wrong expert has many tokens or one, and most of a token or little. dim == moe_inter_dim, so that transposes fit.
FAULTY_FORMS = {
    "48 tokens": {},
    "3 tokens": {"num_tokens": 3},
    "zipf": {
        "num_tokens": 40,
        "n_routed_experts": 16,
        "n_activated_experts": 4,
        "routing": "zipf",
        "masked_share": 0.2,
    },
    "every expert": {"num_tokens": 12, "n_activated_experts": 8},
}


@pytest.mark.certify(share=0.25)
@pytest.mark.parametrize("recipe", ["current", "block"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_mismatch(fault, recipe):
    kind, fields = FAULTS[fault]
    for form in FAULTY_FORMS.values():
        for mode, pick in (("train", "busiest"), ("train" if fault in FORWARD_IS_RIGHT else "forward", "idlest")):
            found = verdict(case(mode=mode, expert_bias=True, **form), faulty(kind, recipe, pick=pick, **fields))
            assert not found.passed, f"{form} {mode} {pick}: {found.worst}"


@pytest.mark.certify(share=0.5)
@pytest.mark.parametrize("recipe", ["current", "block"])
@pytest.mark.parametrize("factor", [0.8, 1.2])
@pytest.mark.parametrize("projection", ["up", "down"])
def test_a_scale_wrong_by_a_fifth_is_found_in_the_expert_with_most_tokens(projection, factor, recipe):
    """A fifth is the least error that is always found.

    A tenth is within a rounding unit, 1/16, plus what rounding adds to it by chance.
    """
    build = faulty(fp8.WrongScale, recipe, factor=factor, projection=projection)
    for form in FAULTY_FORMS.values():
        for seed in range(3):
            found = verdict(case(mode="forward", seed=seed, **form), build)
            assert not found.passed, f"{form} {seed}: {found.worst}"


def test_the_expert_whose_scale_is_wrong_is_named():
    build = faulty(fp8.WrongScale, "block", factor=1.3)
    module = build(moe_config(one := case(mode="forward")))
    parameters, inputs = make_parameters(one, CPU), make_inputs(one, CPU)
    module.load_state_dict(parameters)
    worst = check(one, inputs, parameters, [run_pass(module, inputs, "forward")], "block").worst
    assert (worst.tensor, worst.where) == ("output", f"expert {module.picked[0]}")
    assert worst.error == pytest.approx(0.3, rel=0.1)
    assert worst.budget == pytest.approx(FP8_UNIT, rel=0.01)


# factors: the part of the output's errors that lies along an expert's contribution


def factors(one, inputs: Inputs, parameters, output):
    """Return error over scale by expert."""
    errors = group_errors(one, inputs, parameters, [{"output": output}], fp8_product("block"))
    (by_expert,) = (found for found in errors if found.group == "expert")
    return by_expert.passes_PG[0] / by_expert.scale_G


def exact_output(one, inputs, parameters, factor_of=lambda expert: 1.0):
    """Compute the swiglu formula one choice at a time, with each expert's contribution times a factor."""
    output = torch.zeros(inputs.x_TD.shape, dtype=torch.float64)
    for t, k in (inputs.active_indices_TK >= 0).nonzero().tolist():
        expert, weight = int(inputs.indices_TK[t, k]), inputs.weights_TK[t, k].double()
        gate, up = (inputs.x_TD[t].double() @ parameters["gate_and_up_projs"][expert].double()).chunk(2)
        y = (gate * torch.sigmoid(gate) * up * weight) @ parameters["down_projs"][expert].double()
        output[t] += factor_of(expert) * y
    return output


def drawn(**fields):
    one = case(mode="forward", dim=256, moe_inter_dim=256, n_activated_experts=4, **fields)
    return one, make_inputs(one, CPU), make_parameters(one, CPU)


def test_an_experts_factor_is_its_error_and_nobody_elses():
    one, inputs, parameters = drawn(masked_share=0.25)
    right = factors(one, inputs, parameters, exact_output(one, inputs, parameters))
    assert float(right.max()) < 1e-12
    wrong = factors(one, inputs, parameters, exact_output(one, inputs, parameters, lambda e: 0.7 if e == 5 else 1.0))
    assert float(wrong[5]) == pytest.approx(0.3, rel=1e-9)
    others = wrong[torch.arange(8) != 5]
    assert 0 < float(others.max()) < 0.05


def test_noise_as_large_as_fp8s_is_hardly_along_any_expert():
    one, inputs, parameters = drawn()
    exact = exact_output(one, inputs, parameters)
    noise = torch.randn(exact.shape, dtype=exact.dtype, generator=torch.Generator().manual_seed(0))
    noisy = exact + 0.06 * noise * exact.norm(dim=1, keepdim=True) / math.sqrt(one.dim)
    assert 0 < float(factors(one, inputs, parameters, noisy).max()) < FP8_UNIT / 3


def test_an_expert_that_hardly_counts_is_measured_against_its_tokens():
    """Otherwise the rounding of other experts that happens to lie along this one would be its whole error."""
    one, inputs, parameters = drawn()
    weights = inputs.weights_TK.clone()
    weights[inputs.indices_TK == 5] = 1e-6
    inputs = Inputs(inputs.x_TD, inputs.token_mask_T, weights, inputs.indices_TK, inputs.grad_TD)
    output = exact_output(one, inputs, parameters, lambda e: 2.0 if e == 5 else 1.0)
    assert float(factors(one, inputs, parameters, output)[5]) < 1e-4


def test_an_expert_without_tokens_has_no_factor_and_one_that_is_no_number_has_an_infinite_one():
    one, inputs, parameters = drawn(routing="one-hot")
    output = exact_output(one, inputs, parameters)
    found = check(one, inputs, parameters, [{"output": output.to(torch.bfloat16)}], "block")
    assert found.passed
    output[3, 7] = math.nan
    assert check(one, inputs, parameters, [{"output": output.to(torch.bfloat16)}], "block").worst.error == math.inf


def test_other_dtypes_are_not_looked_at_by_expert():
    """The rounding of other dtypes is so small that the rows show a fault."""
    one, inputs, parameters = drawn()
    errors = group_errors(one, inputs, parameters, [{"output": exact_output(one, inputs, parameters)}])
    assert [found.group for found in errors] == ["token"]


# from the backend's attribute to the verdict


@pytest.mark.parametrize(("build", "status"), [(fp8.Current, "ok"), (fp8.CurrentWithWrongScale, "mismatch")])
def test_a_backends_attribute_names_the_recipe_that_it_is_judged_by(monkeypatch, build, status):
    backend = Backend("third party", build, lambda device, config: None, build.fp8)
    monkeypatch.setattr(subject, "get_backend", lambda name: backend)
    monkeypatch.setitem(ceilings.COPIED_BYTES, "cpu", 1 << 20)
    policy = TimingPolicy(interval_target=0.9, time_cap_s=0.001)
    for mode in ("forward", "train"):
        job = Job(case=case(mode=mode), backend="third party")
        found = job_module.measure_job(job, Workload(CPU), policy)
        assert found["status"].value == status
        assert (found["parity_worst"] <= MARGIN) == (status == "ok")
        assert "time_ms" in found or status == "mismatch"
