"""What a player compares, and what it looks back at."""

import pytest
import torch

from experts import GroupedExperts
from experts.config import DTYPES
from moebench.parity.play.play import Play
from moebench.parity.play.player import Stage, same_bits
from moebench.parity.space.trial import Trial
from moebench.workload.inputs import moe_config

CPU = torch.device("cpu")
TRIAL = Trial(num_tokens=5, n_routed_experts=3, n_activated_experts=2, dim=8, moe_inter_dim=4)


def right(trial):
    return GroupedExperts(moe_config(trial.case).with_dtype(DTYPES[trial.params]))


def played(steps, build=right):
    play = Play(Trial(**{**vars(TRIAL), "steps": steps}), Stage(build, CPU))
    verdict = play.run()
    return play, verdict


def test_passes_since_the_last_zero_grad_are_compared_together():
    """The gradients of parameters add up over both calls, and so do the tokens of the comparison."""
    play, verdict = played(("call", "tokens:other", "call", "backward", "backward"))
    assert verdict.passed
    names = [one.tensor for one in play.errors if not one.where.startswith("after")]
    assert names.count("output") == 1
    assert {"x.grad", "weights.grad", "gate_and_up_projs.grad", "down_projs.grad"} <= set(names)


def test_a_call_without_a_backward_is_compared_by_its_output():
    play, verdict = played(("call:no_grad", "call"))
    assert verdict.passed
    assert not any("grad" in one.tensor for one in play.errors if not one.where.startswith("after"))


def test_every_call_is_looked_back_at():
    play, _ = played(("call", "call:no_grad", "backward"))
    looked = [one for one in play.errors if one.where.startswith("after")]
    assert len(looked) == 2 * 6  # the output and five inputs


class ChangesMask(GroupedExperts):
    def forward(self, x, token_mask, weights, indices):
        result = super().forward(x, token_mask, weights, indices)
        token_mask[0] = False
        return result


def test_a_changed_input_is_named():
    play, verdict = played(("call:no_grad",), lambda trial: ChangesMask(moe_config(trial.case)))
    assert verdict.worst.tensor == "token_mask_T"
    assert verdict.worst.where == "after the call that was handed it"
    assert play.changed is play.player.calls[0]


@pytest.mark.parametrize(
    ("found", "expected", "is_same"),
    [
        (torch.tensor([0.0]), torch.tensor([0.0]), True),
        (torch.tensor([-0.0]), torch.tensor([0.0]), False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (None, torch.tensor([0.0]), False),
        (None, None, True),
    ],
)
def test_same_bits(found, expected, is_same):
    assert (same_bits("t", "here", found, expected).error == 0) is is_same


def test_the_state_dict_of_a_stage_shares_no_memory():
    parameters = {"a": torch.zeros(2)}
    Stage(right, CPU).state(parameters)["a"].fill_(1)
    assert not parameters["a"].any()
    assert torch.equal(Stage(right, CPU).share(parameters)["a"], parameters["a"])
