"""What the probes pass to a backend. tests/moebench/parity/test_faults.py shows that they find their faults."""

import math

import pytest
import torch

from experts import GroupedExperts, Unsupported
from experts.registry import get_backend
from moebench.measure import probes
from moebench.measure.cache import Workload
from moebench.measure.job import measure_job
from moebench.measure.subject import backend_of, make_subject
from moebench.parity.checks import BASE, suite_jobs
from moebench.results.record import Status
from moebench.workload.case import Case, Job
from moebench.workload.inputs import make_inputs, moe_config

CPU = torch.device("cpu")
CASE = Case.model_validate({**BASE, "dtype": "float32"})


def job(check="layouts", backend="loop"):
    return suite_jobs([backend], [check], ["float32"])[0]


def subject_of(one):
    return make_subject(backend_of(one, Workload(CPU)), one, Workload(CPU))


def test_some_choices_are_dropped_and_all_of_an_active_token():
    inputs = make_inputs(CASE, CPU)
    found = probes.dropped(inputs, CASE).active_indices_TK
    lost = (found < 0) & (inputs.active_indices_TK >= 0)
    assert 0.1 < lost.double().mean() < 0.4
    assert (lost.sum(dim=1) == 1).any()
    assert (lost.sum(dim=1) == 2).any()
    assert (inputs.indices_TK >= 0).all(), "the case's own are as they were"


def test_an_expert_is_chosen_twice_and_by_one_token_with_all_choices():
    case = CASE.model_copy(update={"n_activated_experts": 4})
    found = probes.duplicates(make_inputs(case, CPU), case).active_indices_TK
    distinct = torch.tensor([len(set(row.tolist())) for row in found if row[0] >= 0])
    assert (distinct == 3).any()
    assert (distinct == 4).any()
    assert (distinct == 1).sum() == 1


def test_weights_do_not_sum_to_one_and_some_are_zero():
    weights = probes.unnormalised(make_inputs(CASE, CPU), CASE).weights_TK
    assert 0.02 < (weights == 0).double().mean() < 0.25
    assert (weights.sum(dim=1) - 1).abs().max() > 1
    assert float(weights[weights > 0].min()) > 0.2


@pytest.mark.parametrize("layout", [probes._every_other, probes._by_columns])
def test_layouts_keep_the_values_and_nothing_is_contiguous(layout):
    inputs = make_inputs(CASE, CPU)
    found = probes._laid_out(inputs, layout)
    for name in ("x_TD", "weights_TK", "indices_TK", "grad_TD", "token_mask_T"):
        assert torch.equal(getattr(found, name).nan_to_num(), getattr(inputs, name).nan_to_num())
        assert name == "token_mask_T" or not getattr(found, name).is_contiguous()
    assert not probes._every_other(inputs.token_mask_T).is_contiguous()


def test_a_weight_of_zero_has_a_gradient_that_is_measured():
    """The gradient is as large as any other by chance; the reference must not divide by the weight."""
    case = CASE.model_copy(update={"dtype": "float64"})
    subject = subject_of(Job(case=case, backend="loop"))
    inputs = probes.unnormalised(subject.inputs, case)
    tensors = subject.run(inputs.clone())
    found = subject.judge([tensors], inputs)
    assert found.passed, found.worst
    token, choice = ((inputs.weights_TK == 0) & (inputs.active_indices_TK >= 0)).nonzero()[0].tolist()
    tensors["weights.grad"][token, choice] = 0.0
    worst = subject.judge([tensors], inputs).worst
    assert (worst.tensor, worst.where) == ("weights.grad", f"token {token}")


def test_an_examined_job_has_an_error_and_no_time():
    found = measure_job(job("masked-tokens"), Workload(CPU), None)
    assert (found["status"], found["deterministic"]) == (Status.ok, True)
    assert found["parity_worst"] <= 1
    assert "time_ms" not in found


def test_what_ran_is_told():
    found = measure_job(job("fallback", "torch_mm"), Workload(CPU), None)
    assert found["status"] is Status.ok
    assert found["executed"].startswith("aten::_grouped_mm > ")


def test_a_cpu_is_too_small_for_large_offsets_and_says_so_before_anything_is_made():
    (large,) = suite_jobs(["loop"], ["large-offsets"])
    with pytest.raises(Unsupported, match="needs a GPU with 80 GiB free, the device is cpu"):
        probes.examine(large, Workload(CPU))


def test_runs_that_differ_in_a_bit_are_told_of_and_not_judged(monkeypatch):
    """Negative zero is equal to the right value but has another bit pattern."""

    class Flips(GroupedExperts):
        def forward(self, x, token_mask, weights, indices):
            self.sign = -getattr(self, "sign", 1.0)
            output = super().forward(x, token_mask, weights, indices)
            return torch.where(output == 0, self.sign * 0.0, output)

    right = get_backend("loop")
    monkeypatch.setattr(right.__class__, "build", lambda self, config, dispatcher=None: Flips(config))
    found = measure_job(job("masked-tokens"), Workload(CPU), None)
    assert (found["status"], found["deterministic"]) == (Status.ok, False)


def test_who_keeps_weights_by_design_is_not_asked_to_see_an_update(monkeypatch):
    monkeypatch.setattr(GroupedExperts, "caches_weights", True, raising=False)
    found = measure_job(job("updated-weights"), Workload(CPU), None)
    assert found["status"] is Status.unsupported
    assert "loading weights renews them" in found["detail"]


def test_a_state_dict_that_lacks_or_changes_a_tensor_is_infinitely_wrong():
    ones = {"a": torch.ones(3), "b": torch.ones(2)}
    found = probes._differences({"a": torch.tensor([1.0, 1.0, 1.0 + 1e-7])}, ones, "changed")
    assert [(one.tensor, one.error) for one in found] == [("a", math.inf), ("b", math.inf)]
    assert [one.error for one in probes._differences(ones, ones, "changed")] == [0.0, 0.0]


def test_the_config_of_a_case_is_that_of_its_subject():
    subject = subject_of(job())
    assert subject.module.config == moe_config(subject.case)
