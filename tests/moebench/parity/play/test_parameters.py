"""Steps that change, load or save parameters: what a layer must have afterwards."""

from dataclasses import replace

import pytest
import torch

from experts import GroupedExperts
from experts.config import DTYPES
from moebench.parity.play.play import Play
from moebench.parity.play.player import Stage
from moebench.parity.space.trial import Trial
from moebench.workload.inputs import moe_config

CPU = torch.device("cpu")
TRIAL = Trial(
    num_tokens=3, n_routed_experts=3, n_activated_experts=2, dim=8, moe_inter_dim=4, expert_bias=True
)  # fmt: skip
STEPS = ("update", "update:data", "update:replace", "to", "load", "load:prefix", "load:assign", "load:dtype", "init")


def played(*steps, kind=GroupedExperts, **fields):
    def build(trial):
        return kind(moe_config(trial.case).with_dtype(DTYPES[trial.params]))

    play = Play(replace(TRIAL, steps=steps, **fields), Stage(build, CPU))
    return play, play.run()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", STEPS)
def test_the_player_knows_what_the_layer_holds(step, dtype):
    play, verdict = played(step, "save", "call", "backward", dtype=dtype)
    assert verdict.passed, verdict.worst
    state = play.player.layer.state_dict()
    assert state.keys() == play.player.parameters.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, play.player.parameters[name]), name


@pytest.mark.parametrize("step", STEPS)
def test_a_step_changes_the_parameters(step):
    before, after = played("call")[0].player.parameters, played(step, "call")[0].player.parameters
    assert not torch.equal(before["down_projs"].float(), after["down_projs"].float())


def test_a_layer_that_ignores_an_update_is_wrong():
    class Stale(GroupedExperts):
        def expert_parameters(self):
            self.first = getattr(self, "first", None) or type(super().expert_parameters())(
                *(one.detach().clone() for one in super().expert_parameters())
            )
            return self.first

    assert played("call:no_grad", kind=Stale)[1].passed
    assert not played("call:no_grad", "update", "call:no_grad", kind=Stale)[1].passed


def test_a_layer_that_keeps_weights_need_not_see_an_update():
    class Keeps(GroupedExperts):
        caches_weights = True
        weights_changed = None

    before = played("call", kind=Keeps)[0].player.parameters
    assert torch.equal(played("update", "call", kind=Keeps)[0].player.parameters["down_projs"], before["down_projs"])


def test_a_layer_that_keeps_weights_is_told_of_an_update():
    class Keeps(GroupedExperts):
        caches_weights = True
        kept = None

        def weights_changed(self):
            self.kept = None

        def expert_parameters(self):
            self.kept = self.kept or type(own := super().expert_parameters())(*(one.detach().clone() for one in own))
            return self.kept

    play, verdict = played("call:no_grad", "update", "call:no_grad", kind=Keeps)
    assert verdict.passed
    assert any("layer0.weights_changed()" in line for line in play.script.lines)


def test_a_strict_load_must_refuse_both_wrong_state_dicts():
    class Lenient(GroupedExperts):
        def load_state_dict(self, state, strict=True, assign=False):
            return super().load_state_dict(state, strict=False, assign=assign)

    errors = {one.tensor for one in played("strict", kind=Lenient)[0].errors if one.error}
    assert errors == {"gate_and_up_projs", "unknown"}
    assert played("strict")[1].passed


def test_a_state_dict_with_another_name_is_wrong():
    class Extra(GroupedExperts):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("workspace", torch.zeros(1))

        def _load_from_state_dict(self, state, prefix, *rest):
            super()._load_from_state_dict({**state, f"{prefix}workspace": self.workspace}, prefix, *rest)

    assert played("save", kind=Extra)[1].worst.tensor == "workspace"


def test_experts_that_are_all_drawn_alike_are_wrong():
    class Alike(GroupedExperts):
        def init_weights(self, *arguments):
            super().init_weights(*arguments)
            with torch.no_grad():
                self.down_projs.copy_(self.down_projs[:1].expand_as(self.down_projs).clone())

    _, verdict = played("init", kind=Alike)
    assert (verdict.worst.tensor, verdict.worst.where) == ("down_projs", "after init_weights")
    assert played("init")[1].passed


def test_biases_that_are_not_zero_after_init_are_wrong():
    class Ones(GroupedExperts):
        def init_weights(self, *arguments):
            super().init_weights(*arguments)
            torch.nn.init.ones_(self.down_proj_bias)

    assert played("init", kind=Ones)[1].worst.tensor == "down_proj_bias"


def test_what_a_layer_draws_itself_is_the_same_in_every_process():
    """Otherwise the command that a failure prints would try other parameters than those that failed."""
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        play, _ = played("init", "call", "backward")
        drawn.append(play.player.parameters["down_projs"])
    assert torch.equal(*drawn)


@pytest.mark.parametrize("asked_through_a_parent", [False, True])
def test_a_state_dict_is_compared_alone_and_as_a_parent_saves_it(asked_through_a_parent):
    class Zeros(GroupedExperts):
        def state_dict(self, *arguments, prefix="", **named):
            right = super().state_dict(*arguments, prefix=prefix, **named)
            if bool(prefix) is asked_through_a_parent:
                right[f"{prefix}down_projs"] = torch.zeros_like(right[f"{prefix}down_projs"])
            return right

    _, verdict = played("save", kind=Zeros)
    where = "in a parent's state dict" if asked_through_a_parent else "in the state dict"
    assert (verdict.worst.tensor, verdict.worst.where) == ("down_projs", where)
