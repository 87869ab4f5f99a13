"""The steps with a backward: each finds a layer that is wrong only there, and says whether repeated calls agree."""

import pytest
import torch

from experts import GroupedExperts
from moebench.parity.play.backwards import REPEATS
from moebench.parity.play.play import Play
from moebench.parity.play.player import Stage
from moebench.parity.space.trial import Trial
from moebench.workload.inputs import moe_config

SHAPE = "num_tokens=3 n_routed_experts=2 dim=4 moe_inter_dim=4"


class WrongEvery(GroupedExperts):
    """Every call number `every` returns twice the right output."""

    every = 100
    calls = 0

    def forward(self, *inputs):
        type(self).calls += 1
        return super().forward(*inputs) * (2 if type(self).calls % self.every == 0 else 1)


class SecondBackwardIsZero(GroupedExperts):
    """The gradient of x is right in the first backward of a call, and zero in the second."""

    def forward(self, x, *others):
        if x.requires_grad:
            seen = []
            x = x.view_as(x)
            x.register_hook(lambda grad: grad * (0 if seen else 1) + (seen.append(1) or 0))
        return super().forward(x, *others)


def played(layer, steps):
    play = Play(
        Trial.parse(f"steps={steps} {SHAPE}"), Stage(lambda one: layer(moe_config(one.case)), torch.device("cpu"))
    )
    return play, play.run()


@pytest.mark.parametrize("steps", ["call,backward", "call,backward:twice", "call,backward:grad", "repeat"])
def test_right_layers_pass_and_agree_bit_by_bit(steps):
    play, verdict = played(GroupedExperts, steps)
    assert verdict.passed, str(verdict.worst)
    assert play.deterministic is (True if steps == "repeat" else None)


def test_one_wrong_call_among_many_is_found_and_the_calls_differ():
    play, verdict = played(WrongEvery, "repeat")
    assert WrongEvery.every < REPEATS
    assert not verdict.passed
    assert play.deterministic is False


def test_a_second_backward_that_is_wrong_is_found_only_with_retain_graph():
    assert played(SecondBackwardIsZero, "call,backward")[1].passed
    assert not played(SecondBackwardIsZero, "call,backward:twice")[1].passed
