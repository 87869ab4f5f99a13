"""Samples read new values, and the samples that are drawn are judged on the values that they read."""

import dataclasses

import pytest
import torch
from torch import Tensor

from experts import GroupedExperts
from moebench.measure.call import DRAWN, EARLY, Call, NoSpeed, Samples
from moebench.parity.judge import ParityVerdict, TensorError
from moebench.workload.case import Case
from moebench.workload.inputs import make_inputs, moe_config
from tests.moebench.measure.two_ranks import Two

CPU = torch.device("cpu")
CASE = Case(
    num_tokens=12, n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=8, dtype="float32", mode="train",
    masked_share=0.25,
)  # fmt: skip


class Rank(Two):
    """One of two ranks. Both were told the same seed."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def tell(self, value):
        return [2026 if isinstance(value, int) and not isinstance(value, bool) else value, value]


def verdict(over_budget):
    return ParityVerdict((TensorError("output", "token 3", over_budget, 1.0),))


class Judge:
    """Keeps what it judges, and returns the same verdict for each call."""

    def __init__(self, over_budget=0.5):
        self.seen, self.over_budget = [], over_budget

    def __call__(self, passes, inputs):
        self.seen.append((passes, inputs))
        return verdict(self.over_budget)


@pytest.fixture
def call():
    module = GroupedExperts(moe_config(CASE))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.1)
    return Call(module, make_inputs(CASE, CPU), CASE.mode)


def sample(call, samples):
    """Take one sample, and return copies of what it read and of its results."""
    samples.prepare()
    read = call.inputs.clone()
    for stage in call.stages:
        stage()
    results = {name: tensor.clone() for name, tensor in call.result().items()}
    samples.keep()
    return read, results


def same(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.nan_to_num(9.0), two.nan_to_num(9.0))


def made(call, judge=None, ranks=None, fits=True):
    return Samples(call, make_inputs(CASE, CPU), judge or Judge(), ranks or Rank(0), fits)


def test_each_sample_reads_new_values_at_the_same_places(call):
    before = make_inputs(CASE, CPU)
    samples = made(call)
    addresses = [tensor.data_ptr() for tensor in vars(call.inputs).values()]
    read = [sample(call, samples)[0] for _ in range(5)]
    assert [tensor.data_ptr() for tensor in vars(call.inputs).values()] == addresses
    for name in ("x_TD", "weights_TK", "grad_TD"):
        values = [getattr(before, name), *(getattr(one, name) for one in read)]
        assert not any(same(a, b) for n, a in enumerate(values) for b in values[:n])
    for one in read:
        assert torch.equal(one.indices_TK, before.indices_TK)
        assert torch.equal(one.token_mask_T, before.token_mask_T)
        assert torch.equal(one.x_TD.isnan().all(dim=1), ~before.token_mask_T)
        assert torch.allclose(one.weights_TK.sum(dim=1), torch.ones(12))


def test_drawn_samples_are_judged_by_the_values_that_they_read_not_by_what_the_backend_left(call):
    judge = Judge()
    samples = made(call, judge)
    taken = []
    for _ in range(9):
        taken.append(sample(call, samples))
        call.inputs.x_TD.zero_()  # a backend may overwrite its inputs
    samples.check()
    assert len(judge.seen) == DRAWN
    for passes, read in judge.seen:
        (results,) = passes
        (number,) = (n for n, one in enumerate(taken) if same(one[0].x_TD, read.x_TD))
        assert same(taken[number][0].grad_TD, read.grad_TD)
        assert results.keys() == taken[number][1].keys() >= {"output", "x.grad", "weights.grad", "down_projs.grad"}
        assert all(torch.equal(results[name], tensor) for name, tensor in taken[number][1].items())


def test_every_sample_may_be_drawn_and_none_is_for_certain(call):
    """Algorithm R keeps each of 4 samples in half of the runs."""
    counts = dict.fromkeys(range(4), 0)
    for seed in range(200):
        judge = Judge()
        samples = made(call, judge)
        samples._random.seed(seed)
        read = [sample(call, samples)[0].x_TD for _ in range(4)]
        samples.check()
        for _, inputs in judge.seen:
            (number,) = (n for n, x_TD in enumerate(read) if same(x_TD, inputs.x_TD))
            counts[number] += 1
    assert sum(counts.values()) == 200 * DRAWN
    assert all(60 <= count <= 140 for count in counts.values()), counts


def test_all_ranks_draw_the_same_samples_and_read_different_values(call):
    found = []
    for rank in (0, 1):
        judge = Judge()
        samples = made(call, judge, Rank(rank))
        read = [sample(call, samples)[0].x_TD for _ in range(20)]
        samples.check()
        drawn = [n for _, inputs in judge.seen for n, x_TD in enumerate(read) if same(x_TD, inputs.x_TD)]
        found.append((drawn, read[0]))
    assert found[0][0] == found[1][0]
    assert not same(found[0][1], found[1][1])


def test_another_run_draws_other_values(call):
    told = [Samples(call, make_inputs(CASE, CPU), Judge(), Two(), True) for _ in range(2)]
    assert told[0]._random.getrandbits(64) != told[1]._random.getrandbits(64)


@pytest.mark.parametrize("count", [1, EARLY, 3 * EARLY])
def test_where_copies_do_not_fit_one_sample_is_judged_in_its_place(call, count):
    judge = Judge()
    samples = made(call, judge, fits=False)
    for number in range(count):
        before = len(judge.seen)
        _, results = sample(call, samples)
        if len(judge.seen) > before:
            assert number < EARLY
            ((passes, _),) = judge.seen
            assert passes[0]["down_projs.grad"].data_ptr() == call.result()["down_projs.grad"].data_ptr(), "no copy"
            assert torch.equal(passes[0]["output"], results["output"])
    samples.check()
    assert len(judge.seen) == 1


def test_a_wrong_sample_has_no_speed(call):
    samples = made(call, Judge(over_budget=7.0))
    sample(call, samples)
    with pytest.raises(NoSpeed, match=r"output \(token 3\): error 7, budget 1, in a call that was timed") as found:
        samples.check()
    assert found.value.verdict == verdict(7.0)


class Lazy(Tensor):
    pass


def test_a_subclass_is_refused_in_any_sample_and_before_it_is_judged(call):
    judge = Judge()
    samples = made(call, judge)
    sample(call, samples)
    samples.prepare()
    call.forward()
    call.backward()
    parameter = next(iter(call._parameters))
    parameter.grad = parameter.grad.as_subclass(Lazy)
    samples.keep()
    sample(call, samples)
    with pytest.raises(NoSpeed, match="a gradient is a Lazy: a subclass may compute later"):
        samples.check()
    assert judge.seen == []


def test_a_device_that_torch_was_told_to_use_is_not_refused(call):
    samples = made(call)
    with torch.device("cpu"):
        sample(call, samples)
    samples.check()


def test_forward_needs_no_gradients(call):
    case = CASE.model_copy(update={"mode": "forward"})
    forward = Call(call._module, make_inputs(case, CPU), case.mode)
    samples = made(forward)
    _, results = sample(forward, samples)
    assert results.keys() == {"output"}
    assert not results["output"].requires_grad
    assert dataclasses.is_dataclass(forward.inputs)
