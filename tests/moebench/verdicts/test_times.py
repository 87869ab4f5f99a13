"""Verdicts on time say which slowdowns are shown, which are excluded, and which are too small to be seen."""

import math
from itertools import pairwise

import numpy as np
import pytest

from moebench.results.stats import THRESHOLD
from moebench.verdicts.times import FALSE_ALARMS, POWER, Sides, holm, judge_times, round_medians
from moebench.verdicts.verdict import Verdict

#: The times of 10 rounds, all within 0.25% of 1 ms.
STEADY = tuple(1 + 0.001 * step for step in (-2.5, -2, -1.5, -1, -0.5, 0.5, 1, 1.5, 2, 2.5))


def times(factor, rounds=STEADY):
    return tuple(factor * time for time in rounds)


def judge(baseline, candidate, **options):
    return judge_times({"it": Sides(baseline, candidate)}, **options)["it"]


def noisy(random, scale, size=10):
    return tuple(np.exp(random.normal(0, scale, size)))


def test_holm_by_hand():
    """At 5%, 0.01 <= 0.05/4 and 0.015 <= 0.05/3 are shown. 0.03 > 0.05/2 is not, so the next is not shown either."""
    assert holm([0.03, 0.01, 0.04, 0.015], 0.05) == [False, True, False, True]
    assert holm([0.0126] * 4, 0.05) == [False] * 4
    assert holm([0.0125] * 4, 0.05) == [True] * 4
    assert holm([], 0.05) == []


def test_the_verdicts_of_steady_rounds():
    assert judge(STEADY, STEADY).verdict is Verdict.PASS
    assert judge(STEADY, times(1.03)).verdict is Verdict.REGRESSED
    assert judge(STEADY, times(0.97)).verdict is Verdict.IMPROVED
    assert judge(STEADY, times(1.01)).verdict is Verdict.PASS, "shown, and smaller than the threshold"
    assert "less than 3" in judge(STEADY, times(1.01)).reason
    assert judge(STEADY, times(1.01), threshold=0.01).verdict is Verdict.REGRESSED


def test_the_ratio_is_the_candidates_over_the_baselines():
    found = judge(STEADY, times(1.25))
    assert found.ratio == pytest.approx(1.25, rel=1e-6)
    assert found.low < 1.25 < found.high
    assert (found.p_slower, found.p_faster) == (pytest.approx(1 / math.comb(20, 10)), 1)
    assert found.rounds == (10, 10)


def test_noise_is_never_green():
    random = np.random.default_rng(0)
    found = judge(noisy(random, 0.05), noisy(random, 0.05))
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.smallest_effect > THRESHOLD
    assert "too noisy to see a slowdown of 3.0%" in found.reason
    assert judge(noisy(random, 0.05), noisy(random, 0.05), threshold=0.5).verdict is Verdict.PASS


def test_what_is_not_excluded_does_not_pass():
    """The noise is skewed upwards. The test would have shown a slowdown of 3%, but does not exclude one."""
    baseline = (1.0063, 1.0009, 1.006, 1.0012, 1.0037, 1.0053, 1.0027, 1.0011)
    found = judge(baseline, (1.0028, 0.9961, 0.9919, 1.0409, 1.0217, 1.0057, 1.0317, 0.9998))
    assert found.smallest_effect < THRESHOLD < found.high - 1
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "neither shown nor excluded" in found.reason


def test_noise_does_not_hide_what_is_larger():
    random = np.random.default_rng(0)
    assert judge(noisy(random, 0.05), times(1.5, noisy(random, 0.05))).verdict is Verdict.REGRESSED


@pytest.mark.parametrize("rounds", [(1, 1), (1, 20), (20, 1), (0, 5)])
def test_one_process_a_side_is_inconclusive_and_says_what_to_do(rounds):
    found = judge((1.0,) * rounds[0], (2.0,) * rounds[1])
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "--rounds" in found.reason
    assert found.smallest_effect == math.inf


def test_too_few_rounds_for_the_family_say_how_many_it_takes():
    few = STEADY[:5]
    family = {number: Sides(few, times(1.5, few)) for number in range(200)}
    family[0] = Sides(few, few)
    found = judge_times(family)
    assert {verdict.verdict for verdict in found.values()} == {Verdict.INCONCLUSIVE}
    assert "--rounds 9" in found[0].reason
    alone = judge(few, times(1.5, few))
    assert alone.verdict is Verdict.REGRESSED, "5 against 5: p = 1/252 is enough for a family of one"
    enough = {number: Sides(STEADY[:9], times(1 + number / 200, STEADY[:9])) for number in range(200)}
    assert judge_times(enough)[0].verdict is Verdict.PASS
    assert judge_times(enough)[199].verdict is Verdict.REGRESSED


def test_one_process_cases_do_not_count_in_the_family():
    few = STEADY[:5]
    family = {"it": Sides(few, times(1.5, few)), **{number: Sides((1.0,), (1.0,)) for number in range(50)}}
    assert judge_times(family)["it"].verdict is Verdict.REGRESSED


def test_many_rounds_on_one_side_spare_the_other():
    many, few = tuple(1 + 0.0002 * step for step in range(20)), STEADY[:5]
    family = {number: Sides(many, few) for number in range(200)}
    assert all(found.verdict is Verdict.PASS for found in judge_times(family).values())


def test_a_round_is_the_unit_however_many_samples_it_has():
    samples = [1.0, 9.0, 2.0, 5.0, 5.0, 5.0, 7.0]
    assert round_medians(samples, [3, 3, 3, 0, 0, 0, 7]) == {0: 5.0, 3: 2.0, 7: 7.0}


def test_a_disturbed_round_costs_no_verdict():
    disturbed = (*(1 + 0.0002 * step for step in range(15)), 4.0)
    assert judge(disturbed, times(1.03, disturbed)).verdict is Verdict.REGRESSED
    assert judge(disturbed, disturbed).verdict is Verdict.PASS


def test_false_alarms_over_a_family_are_as_rare_as_promised():
    """The rounds have two modes, because times of processes are not normal. The level is high, so 200 gates show it."""
    random = np.random.default_rng(5)
    gates, level, alarms = 200, 0.2, 0
    for _ in range(gates):
        noise = np.where(random.random((20, 24)) < 0.5, 1.0, 1.04) * np.exp(random.normal(0, 0.002, (20, 24)))
        family = {number: Sides(tuple(row[:12]), tuple(row[12:])) for number, row in enumerate(noise)}
        found = judge_times(family, threshold=1e-6, false_alarms=level)
        alarms += any(verdict.verdict is Verdict.REGRESSED for verdict in found.values())
    assert 0.02 < alarms / gates <= level + 3 * math.sqrt(level * (1 - level) / gates)


def test_the_smallest_effect_is_found_as_often_as_it_says():
    """A slowdown by `smallest_effect` is found at least 95 times in 100. Half of it is found in fewer than half."""
    random = np.random.default_rng(11)
    found, half = [], []
    for _ in range(300):
        family = {number: Sides(noisy(random, 0.01, 12), noisy(random, 0.01, 12)) for number in range(8)}
        size = judge_times(family)[0].smallest_effect
        for planted, shown in ((size, found), (size / 2, half)):
            slow = Sides(family[0].baseline_ms, times(1 + planted, family[0].candidate_ms))
            shown.append(judge_times({**family, 0: slow})[0].p_slower <= FALSE_ALARMS / 8)
    assert POWER <= np.mean(found) < 1
    assert np.mean(half) < 0.5


def test_the_threshold_passes_seldom_and_less_noise_is_more_pass():
    random = np.random.default_rng(2)
    shares = []
    for scale in (0.04, 0.012, 0.002):
        sides = [Sides(noisy(random, scale), noisy(random, scale)) for _ in range(60)]
        slow = [Sides(side.baseline_ms, times(1 + THRESHOLD, side.candidate_ms)) for side in sides]
        assert sum(judge_times({0: side})[0].verdict is Verdict.PASS for side in slow) <= 3
        shares.append(sum(judge_times({0: side})[0].verdict is Verdict.PASS for side in sides))
    assert all(less < more for less, more in pairwise(shares))
    assert shares[-1] == 60


# Rounds that were measured together


def together(random, disturbance, slowdown=1.0, rounds=8):
    """Return sides with two processes per side in each round. A disturbance slows all four processes equally."""
    common = random.normal(0, disturbance, rounds)
    blocks = (tuple(number for number in range(rounds) for _ in range(2)),) * 2
    one, two = (np.exp(np.repeat(common, 2) + random.normal(0, 0.002, 2 * rounds)) for _ in "ab")
    return Sides(tuple(one), tuple(two * slowdown), blocks)


def test_what_disturbs_a_whole_round_hides_nothing():
    random = np.random.default_rng(11)
    slow = together(random, disturbance=0.5, slowdown=1.03)
    found = judge_times({"it": slow, "same": together(random, disturbance=0.5)})
    assert (found["it"].verdict, found["same"].verdict) == (Verdict.REGRESSED, Verdict.PASS)
    assert found["it"].ratio == pytest.approx(1.03, abs=0.003)
    assert found["it"].rounds == (16, 16)
    apart = Sides(slow.baseline_ms, slow.candidate_ms)
    assert judge_times({"it": apart})["it"].verdict is Verdict.INCONCLUSIVE


def test_too_few_blocks_ask_for_more_rounds():
    found = judge_times({"it": together(np.random.default_rng(1), 0.0, rounds=2)})["it"]
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.reason == "4 and 4 rounds are too few to show a change among so many cases; measure more"
