"""The covering cases have every pair of values that fits together."""

import pytest

from moebench.parity.space.covering import NOTHING_TO_COMPUTE, covering, missing_pairs
from moebench.parity.space.rules import misfits
from moebench.parity.space.trial import AXES, MANY_TOKENS, RANK_AXES, of_row

#: A part of the space that is quick to cover.
SMALL = {name: AXES[name][:5] for name in ("steps", "num_tokens", "dim", "dtype", "choices", "mask", "limit")}
SMALL |= {"expert_activation": AXES["expert_activation"], "wanted": ("all", "x", "nothing")}


@pytest.fixture(scope="module")
def cases():
    return covering(AXES)


#: With these values, values of an axis that need another axis fit too.
BESIDE = (
    {},
    {"n_routed_experts": 16},
    {"n_routed_experts": 1024},
    {"expert_activation": "swigluoai", "limit": 7.0},
    {"expert_bias": True},
)


def is_possible(pair):
    """Whether a trial with the pair of values fits together."""
    row = {pair[0]: pair[1], pair[2]: pair[3]}
    return any(not list(misfits(of_row({**beside, **row}))) for beside in BESIDE)


def computes_nothing(pair):
    return {pair[:2], pair[2:]} <= set(NOTHING_TO_COMPUTE.items())


def test_every_pair_is_there_but_pairs_of_which_nothing_is_computed(cases):
    left = [pair for pair in missing_pairs(cases) if not computes_nothing(pair) and MANY_TOKENS not in pair]
    assert not [pair for pair in left if is_possible(pair)]
    assert len(cases) < 1000


def test_every_case_fits(cases):
    for trial in cases:
        assert not list(misfits(trial)), trial.text


def test_a_pair_that_no_case_has_is_missing(cases):
    without = [one for one in cases if not (one.dtype == "bfloat16" and one.routing == "zipf")]
    assert ("dtype", "bfloat16", "routing", "zipf") in missing_pairs(without)


def test_every_value_is_in_a_case(cases):
    for name, values in AXES.items():
        met = {getattr(one, name) for one in cases}
        assert set(values) - {"all"} <= met, name


def test_the_cases_of_ranks_cover_too():
    cases = covering(RANK_AXES)
    assert {one.ep_size for one in cases} == {2}
    left = [pair for pair in missing_pairs(cases, RANK_AXES) if not computes_nothing(pair)]
    assert not [pair for pair in left if is_possible(pair)]
    for trial in cases:
        assert not list(misfits(trial)), trial.text


def test_the_same_seed_gives_the_same_cases():
    assert covering(SMALL, 3) == covering(SMALL, 3)
    assert covering(SMALL, 3) != covering(SMALL, 4)


def test_cheap_cases_come_first():
    steps = [len(one.steps) * one.num_rows * one.dim for one in covering(SMALL)]
    assert sum(steps[: len(steps) // 2]) < sum(steps[len(steps) // 2 :])


def test_an_axis_of_one_value_that_computes_nothing_is_still_tried():
    cases = covering({"num_tokens": (0,), "dim": (1, 2), "dtype": ("float32", "float64")})
    assert {(one.num_tokens, one.dim, one.dtype) for one in cases} >= {
        (0, dim, dtype) for dim in (1, 2) for dtype in ("float32", "float64")
    }
