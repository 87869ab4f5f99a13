"""Right layers pass every program. Each step finds the fault that it is for, and without the step nobody sees it."""

from dataclasses import replace

import pytest
import torch

from experts import GroupedExperts
from experts.config import DTYPES
from moebench.parity.judge import Unfit
from moebench.parity.play.play import Play, most_tokens
from moebench.parity.play.player import Stage
from moebench.parity.space.programs import PROGRAMS
from moebench.parity.space.trial import Trial
from moebench.workload.inputs import moe_config
from tests.moebench import faultbench

CPU = torch.device("cpu")
TRIAL = Trial(
    num_tokens=5, n_routed_experts=3, n_activated_experts=2, dim=8, moe_inter_dim=8, expert_bias=True, seed=1
)  # fmt: skip


def verdict(trial, kind=GroupedExperts):
    def build(one):
        return kind(moe_config(one.case).with_dtype(DTYPES[one.params]))

    return Play(trial, Stage(build, CPU)).run()


@pytest.mark.parametrize("program", [one for one in PROGRAMS if one != ("repeat",)], ids=",".join)
def test_a_right_layer_passes_every_program(program):
    for fields in ({}, {"dtype": "bfloat16", "mask": "some", "choices": "some-dropped", "unused_weights": "nan"}):
        found = verdict(replace(TRIAL, steps=program, **fields))
        assert found.passed, found.worst


#: Fault -> the steps that show it, and steps that do not.
SHOWN_BY = {
    "EvalNoBias": (("eval", "call:no_grad"), ("call:no_grad",)),
    "NoGradMinusOne": (("call:no_grad",), ("call", "backward")),
    "InferenceTopOne": (("call:inference",), ("call:no_grad",)),
    "AutocastWeights": (("call:autocast", "backward"), ("call", "backward")),
    "SavedThenFilled": (("call:hooks", "backward"), ("call", "backward")),
    "CheckpointQueue": (("call:reentrant", "backward"), ("call", "backward")),
    "CheckpointMicrobatch": (("call:checkpoint", "backward"), ("call", "backward")),
    "RetainSpent": (("call", "backward:twice"), ("call", "backward")),
    "StackOfPlans": (("call", "call", "backward:newest", "backward"), ("call", "call", "backward", "backward")),
    "GradOverwritten": (
        ("call", "backward", "call", "backward"),
        ("call", "backward", "zero_grad", "call", "backward"),
    ),
    "GrowWorkspace": (("call", "tokens:more", "call"), ("call", "tokens:fewer", "call")),
    "ShrinkBiasGrad": (
        ("call", "tokens:fewer", "call", "backward:newest"),
        ("call", "tokens:more", "call", "backward"),
    ),
    "StalePermutation": (("call", "tokens:other", "call"), ("call", "call")),
    "OutputReusedNoGrad": (("call:no_grad", "tokens:in-place"), ("call:no_grad",)),
    "CastCopy": (("call", "update", "call"), ("call", "call")),
    "CacheByVersion": (("call", "update:data", "call"), ("call", "update", "call")),
    "CacheReplaced": (("call", "update:replace", "call"), ("call", "update", "call")),
    "CacheDtypeMove": (("call", "to", "call"), ("call", "update", "call")),
    "CacheDeepcopy": (("copy", "update", "call"), ("copy", "call")),
    "CacheAssign": (("call", "load:assign", "call"), ("call", "load", "call")),
    "LoadsOnce": (("load", "call"), ("call",)),
    "LoadsNoPrefix": (("load:prefix", "call"), ("load", "call")),
    "LoadsBf16Bits": (("load:dtype", "call"), ("load", "call")),
    "LoadAliases": (("load", "update"), ("load",)),
    "LoadsUnexpected": (("strict",), ("load", "call")),
    "SavesBuffer": (("save",), ("call", "backward")),
    "GlobalLimit": (("second", "switch", "call"), ("second", "call")),
    "TwentiethBackward": (("repeat",), ("call", "backward")),
}
#: What a fault needs besides the steps.
NEEDS = {
    "NoGradMinusOne": {"choices": "some-dropped", "num_tokens": 15},
    "GlobalLimit": {"expert_activation": "quick_geglu", "limit": 7.0, "x_scale": 4.0},
}


@pytest.mark.parametrize("fault", SHOWN_BY)
def test_a_step_shows_its_fault(fault):
    kind = faultbench.kind_of(fault)
    shows, hides = SHOWN_BY[fault]
    trial = replace(TRIAL, **NEEDS.get(fault, {}))
    assert not verdict(replace(trial, steps=shows), kind).passed
    found = verdict(replace(trial, steps=hides), kind)
    assert found.passed, found.worst


def test_memory_that_nobody_wrote_is_nan_in_a_poisoned_trial():
    trial = replace(TRIAL, mask="some", num_tokens=15, memory="poisoned")
    assert not verdict(trial, faultbench.kind_of("UninitialisedOutput")).passed


@pytest.mark.parametrize(
    ("trial", "most"),
    [
        (Trial(num_tokens=0), 1),
        (Trial(num_tokens=7), 7),
        (Trial(num_tokens=7, steps=("call", "tokens:fewer", "call", "tokens:other")), 7),
        (Trial(num_tokens=7, steps=("tokens:more", "call", "tokens:fewer", "tokens:more")), 17),
        (Trial(num_tokens=7, steps=("tokens:more", "tokens:more")), 37),
        (Trial(num_tokens=8, ep_size=2, rank_load="uneven", steps=("tokens:more",)), 19),
    ],
    ids=lambda value: value.text if isinstance(value, Trial) else str(value),
)
def test_the_most_tokens_of_any_call_and_rank_are_known_before_the_first(trial, most):
    assert most_tokens(trial) == most


def test_a_gradient_that_nobody_wanted_is_a_fault():
    assert not verdict(replace(TRIAL, wanted="gate_and_up_projs"), faultbench.kind_of("StackedGradsZeros")).passed
    assert verdict(replace(TRIAL, wanted="gate_and_up_projs")).passed


def test_a_layer_that_returns_no_tensor_raises():
    class Pair(GroupedExperts):
        def forward(self, *inputs):
            return super().forward(*inputs), None

    with pytest.raises(TypeError, match="the layer returned tuple, not a Tensor"):
        verdict(TRIAL, Pair)


def test_a_case_whose_values_overflow_is_unfit():
    with pytest.raises(Unfit, match="float16 cannot hold this case"):
        verdict(replace(TRIAL, dtype="float16", x_scale=30000.0, expert_activation="relu2"))


def test_repeat_says_whether_the_bits_agree():
    def deterministic(kind):
        trial = replace(TRIAL, steps=("repeat",))
        play = Play(trial, Stage(lambda one: kind(moe_config(one.case)), CPU))
        assert play.run().passed
        return play.deterministic

    assert deterministic(GroupedExperts) is True

    class Dithers(GroupedExperts):
        """Adds an error of one rounding now and then."""

        def forward(self, *inputs):
            right = super().forward(*inputs)
            self.count = getattr(self, "count", 0) + 1
            return right * (1 + 2.0**-23) if self.count % 9 == 0 else right

    assert deterministic(Dithers) is False
