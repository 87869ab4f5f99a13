"""The search draws trials that fit, the same for the same seed, and shrinks a failing trial to the smallest."""

import pytest

from moebench.parity.space.rules import misfits
from moebench.parity.space.search import BATCH, MOST_STEPS, drawn, size, smallest
from moebench.parity.space.trial import AXES, RANK_AXES, Trial


def first(count, seed=0, axes=AXES):
    return [trial for _, trial in zip(range(count), drawn(axes, seed), strict=False)]


@pytest.fixture(scope="module")
def three_batches():
    return first(3 * BATCH)


def test_the_same_seed_gives_the_same_trials(three_batches):
    assert three_batches[: BATCH + 5] == first(BATCH + 5)
    assert three_batches[: BATCH // 2] != first(BATCH // 2, 1)


def test_trials_of_a_batch_differ_and_fit(three_batches):
    trials = three_batches[: BATCH // 2]
    assert len(set(trials)) == BATCH // 2
    for trial in three_batches:
        assert not list(misfits(trial)), trial.text
        assert len(trial.steps) <= MOST_STEPS or trial.steps in AXES["steps"]


def test_trials_of_ranks_fit():
    """All of them have two ranks, so that numbers of experts that two ranks cannot share are not drawn."""
    trials = first(BATCH, axes=RANK_AXES)
    assert {trial.ep_size for trial in trials} == {2}
    assert any(trial.n_routed_experts not in RANK_AXES["n_routed_experts"] for trial in trials)
    for trial in trials:
        assert not list(misfits(trial)), trial.text


def test_values_between_those_of_an_axis_are_drawn_too(three_batches):
    assert any(trial.num_tokens not in AXES["num_tokens"] for trial in three_batches)
    assert any(trial.steps not in AXES["steps"] for trial in three_batches)


def test_a_trial_is_what_its_text_says(three_batches):
    for trial in three_batches:
        assert Trial.parse(trial.text) == trial


def test_an_axis_that_is_left_out_has_its_simplest_value():
    for trial in first(20, axes={"dtype": ("bfloat16",), "num_tokens": (1, 2, 3)}):
        assert (trial.dtype, trial.dim, trial.steps) == ("bfloat16", 1, ("call", "backward"))


BIG = Trial(
    steps=("call", "backward", "update", "call:no_grad", "call", "backward"),
    num_tokens=65, n_routed_experts=16, n_activated_experts=4, dim=100, moe_inter_dim=33, dtype="bfloat16",
    expert_bias=True, routing="zipf", choices="some-dropped", mask="some", x_layout="columns", wanted="all-but-x",
    seed=5,
)  # fmt: skip


def found(fails, is_late=lambda: False):
    assert fails(BIG)
    return smallest(BIG, fails, is_late)


def test_the_smallest_trial_that_fails_is_found():
    assert found(lambda one: True) == Trial(steps=("call",), seed=5)
    assert found(lambda one: "update" in one.steps) == Trial(steps=("update",), seed=5)
    trial = found(lambda one: one.expert_bias and one.n_routed_experts >= 3)
    assert trial == Trial(steps=("call",), n_routed_experts=3, expert_bias=True, seed=5)


def test_two_conditions_are_both_kept():
    trial = found(lambda one: one.mask == "some" and "backward" in one.steps and one.num_tokens >= 7)
    assert trial == Trial(steps=("backward",), num_tokens=7, mask="some", seed=5)


def test_a_smaller_trial_of_ranks_fits():
    failing = Trial(n_routed_experts=66, num_tokens=17, dim=16, ep_size=2, seed=1)
    tried = []
    trial = smallest(failing, lambda one: not tried.append(one) and one.num_tokens > 2, lambda: False, RANK_AXES)
    assert trial == Trial(steps=trial.steps, n_routed_experts=2, num_tokens=3, dim=8, ep_size=2, seed=1)
    for one in tried:
        assert not list(misfits(one)), one.text


def test_the_trial_itself_is_returned_if_nothing_simpler_fails():
    assert found(lambda one: one == BIG) == BIG


def test_a_late_search_returns_what_failed():
    assert found(lambda one: True, is_late=lambda: True) == BIG


def test_every_trial_is_tried_once():
    tried = []

    def fails(one):
        tried.append(one)
        return one.dim >= 8

    smallest(BIG, fails, lambda: False)
    assert len(set(tried)) == len(tried)


def test_fewer_steps_are_simpler_than_smaller_sizes():
    assert size(Trial(steps=("call",), num_tokens=100)) < size(Trial(steps=("call", "backward")))
    assert size(Trial(num_tokens=2)) < size(Trial(num_tokens=3))
    assert size(Trial(steps=("call",))) < size(Trial(steps=("call:no_grad",)))
    assert size(Trial()) < size(Trial(dtype="bfloat16"))
