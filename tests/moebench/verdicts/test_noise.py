"""Times that are drawn from recorded times vary as the recorded times did, and not more."""

import numpy as np
import pytest

from moebench.results.record import Status
from moebench.verdicts.noise import Noise, NoiseTogether, noises, noises_together
from moebench.verdicts.times import judge_times
from tests.moebench.gated import bad, frame, job_of, ok

RANDOM = np.random.default_rng(17)


def noise(log_rounds=(0.0,), log_samples=(0.0,), between=0.0):
    return Noise("loop", np.asarray(log_rounds, float), np.asarray(log_samples, float), between)


# Times that are drawn


def test_one_process_varies_as_its_samples_and_as_assumed():
    assert noise().draw(RANDOM, 5).tolist() == [0.0] * 5
    assert np.std(noise(between=0.01).draw(RANDOM, 4000)) == pytest.approx(0.01, rel=0.1)
    samples = RANDOM.normal(0, 0.1, 100)
    assert np.std(noise(log_samples=samples).draw(RANDOM, 4000)) == pytest.approx(0.1 * 1.2533 / 10, rel=0.25)


def test_neighbours_stay_neighbours():
    """The medians of a process that drifts vary more than the medians of the same samples in random order."""
    drift = np.linspace(-0.1, 0.1, 100)
    spreads = [np.std(noise(log_samples=some).draw(RANDOM, 2000)) for some in (drift, RANDOM.permutation(drift))]
    assert spreads[0] > 1.5 * spreads[1]


def test_recorded_rounds_are_what_varies():
    rounds = RANDOM.normal(0, 0.02, 30)
    recorded = noise(rounds, log_samples=RANDOM.normal(0, 9, 100), between=9)
    assert recorded.is_recorded
    assert np.std(recorded.draw(RANDOM, 4000)) == pytest.approx(np.std(rounds), rel=0.15)
    assert not noise([0.0] * 4).is_recorded
    disturbed = noise([0.0] * 19 + [1.0])
    assert set(disturbed.draw(RANDOM, 50)) <= {0.0, 1.0}, "an outlier is drawn as one, and smears nothing"


def test_noises_are_those_of_jobs_with_a_time():
    rows = frame(ok(job_of(1), [2.0, 4.0, 8.0, 4.0, 4.0]), ok(job_of(2), [3.0]), bad(job_of(3), Status.oom))
    first, second = noises(rows, 0.01)
    assert first.log_rounds.tolist() == pytest.approx(np.log([0.5, 1, 2, 1, 1]))
    assert (first.is_recorded, second.is_recorded) == (True, False)
    assert len(second.log_samples) == 3


def test_sides_have_the_rounds_that_are_asked_for_and_the_shift_of_their_session():
    sides = noise().sides(RANDOM, (7, 3), session=0.1)
    assert sides.rounds == (7, 3)
    assert len(set(sides.baseline_ms)) == len(set(sides.candidate_ms)) == 1
    assert sides.baseline_ms[0] != sides.candidate_ms[0]


# Rounds that were measured side by side


def test_rounds_of_ab_are_those_that_all_its_processes_finished():
    one = frame(ok(job_of(1), [2.0, 4.0, 8.0, 8.0, 5.0]), ok(job_of(2), [3.0]), bad(job_of(3), Status.oom))
    two = frame(ok(job_of(1), [2.0, 2.0, 8.0, 16.0]), ok(job_of(3), [1.0]))
    (job,) = noises_together(one, two)
    assert job.log_rounds == pytest.approx(np.log([[1.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0]]))


def test_processes_of_a_round_are_shared_out_anew_and_stay_in_their_round():
    rounds = np.array([[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]])
    job = NoiseTogether("loop", rounds)
    sides = job.sides(np.random.default_rng(2), (800, 800))
    assert sides.rounds == (800, 800)
    assert sides.blocks == (tuple(np.repeat(range(400), 2).tolist()),) * 2
    one, two = (np.log(some).reshape(400, 2) for some in (sides.baseline_ms, sides.candidate_ms))
    spread = np.concatenate([one, two], axis=1)
    assert (np.abs(spread - spread.mean(axis=1, keepdims=True)) < 5).all()
    assert np.mean(one - two) == pytest.approx(0, abs=0.2), "no side has the fast ones"


def test_what_a_round_had_in_common_is_no_noise():
    common = RANDOM.normal(0, 1, (30, 1))
    job = NoiseTogether("loop", common + RANDOM.normal(0, 0.001, (30, 4)))
    found = judge_times({"it": job.sides(RANDOM, (16, 16))})["it"]
    assert found.smallest_effect < 0.01
