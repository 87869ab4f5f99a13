"""Compare the reference with the formulas of shared/backends.md, written out here one token at a time."""

import math

import pytest
import torch

from experts.modules import parameter_shapes
from moebench.parity.reference import GroupErrors, group_errors
from moebench.workload.case import ACTIVATIONS, Case
from moebench.workload.inputs import Inputs, make_inputs, make_parameters, moe_config

CPU = torch.device("cpu")


def case(**fields):
    shape = {"num_tokens": 12, "n_routed_experts": 5, "n_activated_experts": 3, "dim": 6, "moe_inter_dim": 4}
    return Case.model_validate({**shape, "dtype": "float64", "expert_bias": True, "masked_share": 0.25, **fields})


def naive_activation(case, h):
    """Turn h, one expert's first projection of one token, into the input of its second projection."""
    inter = case.moe_inter_dim
    if case.expert_activation == "relu2":
        return torch.stack([v * v if v > 0 else 0 * v for v in h])
    if case.expert_activation == "quick_geglu":
        return torch.stack([naive_glu(case, h[2 * i], h[2 * i + 1]) for i in range(inter)])
    return torch.stack([naive_glu(case, h[i], h[inter + i]) for i in range(inter)])


def naive_glu(case, gate, up):
    match case.expert_activation:
        case "swiglu":
            if case.swiglu_limit:
                limit = torch.tensor(case.swiglu_limit).double()
                gate, up = min(gate, limit), max(min(up, limit), -limit)
            return gate / (1 + torch.exp(-gate)) * up
        case "geglu":
            inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
            return 0.5 * gate * (1 + torch.tanh(inner)) * up
        case "quick_geglu" | "swigluoai":
            limit = torch.tensor(case.activation_limit).double()
            gate, up = min(gate, limit), max(min(up, limit), -limit)
            return gate / (1 + torch.exp(-case.activation_alpha * gate)) * (up + 1)


def naive_pass(case: Case, inputs: Inputs, parameters):
    """Return the output and every gradient, in float64, by autograd over the formulas."""
    leaves = {"x": inputs.x_TD, "weights": inputs.weights_TK, **parameters}
    leaves = {name: leaf.detach().double().clone().requires_grad_() for name, leaf in leaves.items()}
    gate_up_bias, down_bias = leaves.get("gate_up_proj_bias"), leaves.get("down_proj_bias")
    rows = []
    for t in range(case.num_tokens):
        row = torch.zeros(case.dim, dtype=torch.float64)
        for k in range(case.n_activated_experts):
            e, w = int(inputs.indices_TK[t, k]), leaves["weights"][t, k]
            if not inputs.token_mask_T[t] or e < 0:
                continue
            h = leaves["x"][t] @ leaves["gate_and_up_projs"][e]
            h = h if gate_up_bias is None else h + gate_up_bias[e]
            a = naive_activation(case, h)
            a = a if case.apply_router_weight_after_down else a * w
            y = a @ leaves["down_projs"][e]
            if down_bias is not None:
                y = y + (down_bias[e] if case.apply_router_weight_after_down else down_bias[e] * w)
            row = row + (y * w if case.apply_router_weight_after_down else y)
        rows.append(row)
    output = torch.stack(rows)
    grads = torch.autograd.grad(output, list(leaves.values()), inputs.grad_TD.double(), materialize_grads=True)
    return {"output": output.detach(), **{f"{name}.grad": grad for name, grad in zip(leaves, grads, strict=True)}}


def errors_of(case, tensors, inputs, parameters) -> dict[str, GroupErrors]:
    return {errors.tensor: errors for errors in group_errors(case, inputs, parameters, [tensors])}


ACTIVATION_CASES = [{"expert_activation": name} for name in ACTIVATIONS] + [
    {"swiglu_limit": 0.5},
    {"expert_activation": "swigluoai", "activation_alpha": 0.7, "activation_limit": 0.25},
    {"expert_activation": "quick_geglu", "activation_alpha": 0.7, "activation_limit": 0.25},
    {"expert_bias": False},
    {"expert_activation": "relu2", "expert_bias": False},
    {"apply_router_weight_after_down": True},
    {"apply_router_weight_after_down": True, "expert_bias": False},
    {"moe_inter_dim": 6},  # as wide as dim: a transposed weight fits
    {"routing": "one-hot"},  # two experts of five without tokens
]


@pytest.mark.parametrize("fields", ACTIVATION_CASES, ids=str)
def test_reference_is_the_formulas(fields):
    one = case(mode="train", **fields)
    inputs, parameters = make_inputs(one, CPU), make_parameters(one, CPU)
    found = errors_of(one, naive_pass(one, inputs, parameters), inputs, parameters)
    assert found.keys() == {"output", "x.grad", "weights.grad", *(f"{name}.grad" for name in parameters)}
    for errors in found.values():
        wrong = errors.passes_PG[0] > 1e-13 * errors.scale_G
        assert not wrong.any(), f"{errors.tensor}: {errors.group} {wrong.nonzero().flatten().tolist()}"


def test_clamps_bite_in_the_cases_that_have_them():
    """The cases clamp between 0.1% and 1% of the projections, so that they find a backend without the limit."""
    for fields in ({"swiglu_limit": 2.0}, {"expert_activation": "swigluoai"}, {"expert_activation": "quick_geglu"}):
        one = case(num_tokens=200, dim=64, moe_inter_dim=64, expert_bias=False, masked_share=0.0, **fields)
        projected = make_inputs(one, CPU).x_TD @ make_parameters(one, CPU)["gate_and_up_projs"][0]
        limit = one.swiglu_limit or one.activation_limit
        assert 0.001 < (projected.abs() > limit).double().mean() < 0.01


def test_a_float32_loop_is_measured_by_its_own_rounding():
    one = case(mode="train", dtype="float32", num_tokens=64, dim=64, moe_inter_dim=64)
    inputs, parameters = make_inputs(one, CPU), make_parameters(one, CPU)
    exact = naive_pass(one, inputs, parameters)
    for name, errors in errors_of(one, exact, inputs, parameters).items():
        loop = errors.rounding_G / errors.scale_G.clamp(min=1e-300)
        assert 0 < loop.max() < 1e-5, name  # float32 rounds to 6e-8
        assert errors.passes_PG[0].max() <= 1e-13 * errors.scale_G.max(), f"{name}: the exact pass has no error"


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_errors_are_those_of_the_rows_and_experts_that_are_wrong(mode):
    one = case(mode=mode)
    inputs, parameters = make_inputs(one, CPU), make_parameters(one, CPU)
    tensors = naive_pass(one, inputs, parameters)
    if mode == "forward":
        tensors = {"output": tensors["output"]}
    token = int(inputs.token_mask_T.nonzero()[2])
    tensors["output"][token, 3] += 0.5
    tokens = {errors.tensor: errors for errors in group_errors(one, inputs, parameters, [tensors])}["output"].passes_PG[
        0
    ]
    assert float(tokens[token]) == pytest.approx(0.5, rel=1e-12)
    assert int((tokens > 1e-12).sum()) == 1
    if mode == "train":
        tensors["down_projs.grad"][1] *= 1.5
        errors = errors_of(one, tensors, inputs, parameters)["down_projs.grad"]
        third = float(torch.linalg.vector_norm(tensors["down_projs.grad"][1])) / 3  # 0.5 of what it was
        assert errors.passes_PG[0].tolist() == pytest.approx([0, third, 0, 0, 0], abs=1e-12)


def test_a_row_is_measured_against_no_less_than_the_usual_row():
    """Otherwise a row with terms that cancel accuses a right backend. An expert without tokens must be zero instead."""
    one = case(mode="train", masked_share=0.0, routing="one-hot")
    inputs, parameters = make_inputs(one, CPU), make_parameters(one, CPU)
    found = errors_of(one, tensors := naive_pass(one, inputs, parameters), inputs, parameters)
    rows = torch.linalg.vector_norm(tensors["output"], dim=1)
    usual = rows.square().mean().sqrt()
    scale_T = found["output"].scale_G
    assert (scale_T >= rows.clamp(min=float(usual)) * (1 - 1e-12)).all()
    assert scale_T.min() < scale_T.max()
    assert (scale_T <= 2 * rows.max()).all()
    experts = torch.linalg.vector_norm(tensors["down_projs.grad"].flatten(1), dim=1)
    assert (found["down_projs.grad"].scale_G >= experts * (1 - 1e-12)).all()
    assert int((found["down_projs.grad"].scale_G == 0).sum()) == 2


@pytest.mark.parametrize("tensor", ["output", "x.grad", "weights.grad"])
def test_what_masked_tokens_must_leave_at_zero_is_infinitely_wrong_if_not(tensor):
    one = case(mode="train")
    inputs, parameters = make_inputs(one, CPU), make_parameters(one, CPU)
    masked = int((~inputs.token_mask_T).nonzero()[0])
    for value in (1e-300, math.nan):
        tensors = naive_pass(one, inputs, parameters)
        assert not tensors[tensor][masked].any()
        tensors[tensor][masked, 1] = value
        assert not errors_of(one, tensors, inputs, parameters)[tensor].passes_PG[0, masked].isfinite()


def test_a_choice_of_no_expert_must_have_no_gradient_even_beside_choices_that_have():
    one = case(mode="train", masked_share=0.0)
    drawn, parameters = make_inputs(one, CPU), make_parameters(one, CPU)
    indices = drawn.indices_TK.clone()
    indices[4, 1] = -1
    indices[5, :] = indices[5, 0]  # the token chooses one expert three times
    inputs = Inputs(drawn.x_TD, drawn.token_mask_T, drawn.weights_TK, indices, drawn.grad_TD)
    tensors = naive_pass(one, inputs, parameters)
    for errors in errors_of(one, tensors, inputs, parameters).values():
        assert (errors.passes_PG[0] <= 1e-13 * errors.scale_G).all(), errors.tensor
    tensors["weights.grad"][4, 1] = 1e-300
    assert errors_of(one, tensors, inputs, parameters)["weights.grad"].passes_PG[0, 4] == math.inf


def test_parameters_of_a_case_are_those_of_its_layer():
    one = case(expert_activation="relu2")
    assert {name: tuple(p.shape) for name, p in make_parameters(one, CPU).items()} == parameter_shapes(moe_config(one))
