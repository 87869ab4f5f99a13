"""The oracle of a block chooses as the block's router does, and finds what is wrong around the experts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moebench.measure.cache import Workload
from moebench.measure.context.block import in_block
from moebench.measure.subject import Subject, backend_of, make_subject
from moebench.parity.block import CLEAR, Around, make_around
from moebench.parity.reference import Tensors, exact_pass
from moebench.workload.case import Case, Job
from moebench.workload.inputs import Inputs, make_inputs
from moebench.workload.models import BLOCKS

CPU = torch.device("cpu")
#: A softmax that is divided by its sum, one that is not, a gate, and a sigmoid with groups and a bias.
KINDS = ("qwen3-30b-a3b", "olmoe", "qwen3-next-80b", "deepseek-v3")


def case(model: str = "deepseek-v3", **fields: Any) -> Case:
    shape = {"n_routed_experts": 16, "n_activated_experts": 3, "dim": 32, "moe_inter_dim": 16, "num_tokens": 40}
    more = {"subject": f"block:{model}", "mode": "train", "dtype": "float32", "masked_share": 0.2}
    return Case.model_validate({**shape, **more, **fields})


def around_of(one: Case) -> Around:
    around = make_around(one, CPU)
    assert around is not None
    return around


def routed(one: Case) -> tuple[Around, Inputs]:
    around, inputs = around_of(one), make_inputs(one, CPU)
    around.route(inputs)
    return around, inputs


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("model", KINDS)
def test_the_choices_are_those_of_the_blocks_router_to_the_bit(model: str, dtype: str) -> None:
    around, inputs = routed(case(model, dtype=dtype))
    router: Any = in_block(torch.nn.Identity(), around, CPU).block.router
    weights_TK, indices_TK = router(inputs.x_TD.masked_fill(~inputs.token_mask_T.unsqueeze(1), 0.0))
    active = inputs.token_mask_T
    assert torch.equal(indices_TK[active], inputs.indices_TK[active])
    assert torch.equal(weights_TK[active], inputs.weights_TK[active])
    assert inputs.weights_TK.dtype is weights_TK.dtype


def test_every_model_has_a_block_of_its_own_fields() -> None:
    assert [make_around(case("qwen3-30b-a3b", subject="experts"), CPU)] == [None]
    for model, fields in BLOCKS.items():
        around = around_of(case(model))
        assert around.fields == fields
        assert (around.bias_E is None) == ("correction_bias" not in fields)
        assert ("shared_experts.down_proj" in around.parameters) == ("n_shared_experts" in fields)


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v3"])
def test_a_choice_that_is_not_clear_is_replaced_by_a_clear_one(model: str) -> None:
    """Two experts with the same score, which some tokens would have to choose between."""
    one = case(model, masked_share=0.0, n_routed_experts=16)
    around, inputs = around_of(one), make_inputs(one, CPU)
    twins = around.parameters["router.weight"]
    twins[1] = twins[0]
    if around.bias_E is not None:
        around.bias_E[1] = around.bias_E[0]
    before = inputs.x_TD.clone()
    _, clear_T = around._choose(around._scores(before, inputs.token_mask_T))
    is_tie_T = clear_T == 0
    assert 0 < is_tie_T.sum() < len(before) / 2
    around.route(inputs)
    assert torch.equal(inputs.x_TD[~is_tie_T], before[~is_tie_T])
    assert not (inputs.x_TD[is_tie_T] == before[is_tie_T]).all(dim=1).any()
    _, clear_T = around._choose(around._scores(inputs.x_TD, inputs.token_mask_T))
    assert clear_T.min() > CLEAR * torch.finfo(torch.float32).eps / 2


def test_no_token_needs_no_choice() -> None:
    for fields in ({"num_tokens": 0}, {"masked_share": 1.0}):
        _, inputs = routed(case(**fields))
        assert inputs.x_TD.shape[1] == 32


def subject_of(one: Case, backend: str = "loop") -> Subject:
    job, workload = Job(case=one, backend=backend), Workload(CPU)
    return make_subject(backend_of(job, workload), job, workload)


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("backend", ["loop", "torch_mm"])
@pytest.mark.parametrize("model", KINDS)
def test_a_right_block_passes(model: str, backend: str, mode: str) -> None:
    subject = subject_of(case(model, mode=mode, dtype="bfloat16"), backend)
    verdict = subject.judge([subject.run(subject.inputs.clone())])
    assert verdict.passed, verdict.worst
    assert verdict.worst.over_budget > 0.01
    assert ("router.weight.grad" in verdict.errors) == (mode == "train")
    assert "weights.grad" not in verdict.errors


def _without_the_router(tensors: Tensors, subject: Subject) -> Tensors:
    """Return the gradient of x without the part that comes through the routing weights."""
    assert subject.around is not None
    lost = subject.around.added(subject.inputs, _weights_grad(subject), torch.float32, lambda tensor: tensor)["x.grad"]
    kept = subject.around.added(subject.inputs, 0 * _weights_grad(subject), torch.float32, lambda tensor: tensor)
    return tensors | {"x.grad": (tensors["x.grad"] - lost + kept["x.grad"]).to(tensors["x.grad"].dtype)}


def _weights_grad(subject: Subject) -> Tensor:
    return exact_pass(subject.case, subject.inputs, subject.parameters)["weights.grad"]


FAULTS: dict[str, Any] = {
    "output": lambda tensors, _: tensors | {"output": 1.02 * tensors["output"]},
    "router.weight.grad": lambda tensors, _: tensors | {"router.weight.grad": 1.02 * tensors["router.weight.grad"]},
    "router.weight.grad of one expert": lambda tensors, _: (
        tensors
        | {"router.weight.grad": tensors["router.weight.grad"] * torch.where(torch.arange(16) == 3, 1.1, 1.0)[:, None]}
    ),
    "shared_experts.down_proj.grad": lambda tensors, _: (
        tensors | {"shared_experts.down_proj.grad": 1.02 * tensors["shared_experts.down_proj.grad"]}
    ),
    "shared_experts.gate_and_up_proj.grad": lambda tensors, _: (
        tensors
        | {"shared_experts.gate_and_up_proj.grad": tensors["shared_experts.gate_and_up_proj.grad"].roll(1, dims=0)}
    ),
    "shared_experts.gate.grad": lambda tensors, _: (
        tensors | {"shared_experts.gate.grad": 0 * tensors["shared_experts.gate.grad"]}
    ),
    "x.grad": _without_the_router,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_around_the_experts_is_found(name: str, dtype: str) -> None:
    """A factor of 1.02 is found in bfloat16, too."""
    subject = subject_of(case("qwen3-next-80b", dtype=dtype))
    right = subject.run(subject.inputs.clone())
    assert subject.judge([right]).passed
    verdict = subject.judge([FAULTS[name](right, subject)])
    assert not verdict.passed
    assert verdict.worst.tensor == name.split()[0]


def test_a_gradient_that_is_missing_is_an_error() -> None:
    subject = subject_of(case())
    tensors = subject.run(subject.inputs.clone())
    del tensors["router.weight.grad"]
    assert math.isinf(subject.judge([tensors]).errors["router.weight.grad"])


def test_the_operations_of_router_and_shared_experts_count() -> None:
    one = case("deepseek-v2-lite", mode="forward", masked_share=0.0)
    numbers = 16 * 32 + 3 * 32 * 2 * 16  # two shared experts
    assert around_of(one).flops() == 2 * 40 * numbers
    assert around_of(one.model_copy(update={"mode": "train"})).flops() == 3 * 2 * 40 * numbers
    assert subject_of(one).flops == one.flops() + 2 * 40 * numbers
