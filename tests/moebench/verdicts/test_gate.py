"""A gate judges the time, memory and parity of every job of two results, and gives one exit code."""

import math

import pytest

from moebench.errors import ResultsError
from moebench.results.record import Status
from moebench.verdicts.verdict import Verdict
from tests.moebench.gated import bad, gated, job_of, ok, steady

JOB, OTHER = job_of(64), job_of(128)
SLOW = steady(time_ms=1.05)


def only(result):
    (job,) = result.jobs
    return job


def verdicts(job):
    return {finding.measure: finding.verdict for finding in job.findings}


def test_nothing_changed():
    result = gated([ok(JOB, steady())], [ok(JOB, steady(seed=1))])
    assert verdicts(only(result)) == dict.fromkeys(("time", "memory", "parity"), Verdict.PASS)
    assert (only(result).verdict, result.exit_code) == (Verdict.PASS, 0)
    assert result.counts == {Verdict.PASS: 1}


def test_slower_is_exit_code_1_and_faster_0():
    result = gated([ok(JOB, steady())], [ok(JOB, SLOW)])
    assert (only(result).verdict, result.exit_code) == (Verdict.REGRESSED, 1)
    assert only(result).time.ratio == pytest.approx(1.05, rel=1e-3)
    result = gated([ok(JOB, SLOW)], [ok(JOB, steady())])
    assert (only(result).verdict, result.exit_code) == (Verdict.IMPROVED, 0)
    assert verdicts(only(result))["memory"] is Verdict.PASS


def test_the_threshold_is_the_callers():
    assert only(gated([ok(JOB, steady())], [ok(JOB, SLOW)], threshold=0.1)).verdict is Verdict.PASS


def test_one_process_a_side_is_inconclusive_and_exit_code_3():
    result = gated([ok(JOB, [1.0])], [ok(JOB, [9.0])])
    assert (only(result).verdict, result.exit_code) == (Verdict.INCONCLUSIVE, 3)
    assert "--rounds" in only(result).finding("time").reason
    samples = {"sample_rounds": None}
    assert only(gated([ok(JOB, SLOW, **samples)], [ok(JOB, SLOW, **samples)])).time.rounds == (1, 1)


def test_a_regression_outweighs_what_is_open():
    result = gated([ok(JOB, steady()), ok(OTHER, [1.0])], [ok(JOB, SLOW), ok(OTHER, [1.0])])
    assert result.counts == {Verdict.REGRESSED: 1, Verdict.INCONCLUSIVE: 1}
    assert result.exit_code == 1


def test_new_and_missing_jobs():
    result = gated([ok(JOB, steady()), ok(OTHER, steady())], [ok(JOB, steady())])
    assert [job.verdict for job in result.jobs] == [Verdict.PASS, Verdict.MISSING]
    assert result.exit_code == 1
    result = gated([ok(JOB, steady())], [ok(JOB, steady()), ok(OTHER, steady())])
    assert [job.verdict for job in result.jobs] == [Verdict.PASS, Verdict.NEW]
    assert result.exit_code == 0
    result = gated([ok(JOB, steady())], [ok(JOB, steady()), bad(OTHER, Status.mismatch)])
    assert verdicts(result.jobs[1]) == {"job": Verdict.NEW, "parity": Verdict.REGRESSED}
    assert result.exit_code == 1


def test_the_backend_and_dispatcher_are_part_of_a_job():
    one, two = (
        job_of(backend="te", ep_size=2, dispatcher="deepep"),
        job_of(backend="te", ep_size=2, dispatcher="alltoall"),
    )
    result = gated([ok(JOB, steady()), ok(one, steady())], [ok(JOB, steady()), ok(two, steady())])
    assert [job.verdict for job in result.jobs] == [Verdict.PASS, Verdict.MISSING, Verdict.NEW]
    assert [job.backend for job in result.jobs] == ["loop", "te+deepep", "te+alltoall"]


def test_no_job_in_common_is_one_line():
    with pytest.raises(ResultsError, match="no job in common") as refused:
        gated([ok(JOB, steady())], [ok(OTHER, steady())])
    assert "\n" not in str(refused.value)


def test_the_family_is_what_is_compared():
    """Nine rounds per side are enough for 200 jobs. Five are enough for a single job, but not for 200."""
    jobs = [job_of(number) for number in range(1, 201)]

    def of(num_rounds, factor):
        first = [ok(jobs[0], steady(num_rounds, factor))]
        return [*first, *(ok(job, steady(num_rounds, seed=number)) for number, job in enumerate(jobs[1:]))]

    assert gated(of(9, 1), of(9, 1.05)).counts == {Verdict.REGRESSED: 1, Verdict.PASS: 199}
    assert gated(of(5, 1), of(5, 1.05)).counts == {Verdict.INCONCLUSIVE: 200}
    assert gated(of(5, 1)[:1], of(5, 1.05)[:1]).counts == {Verdict.REGRESSED: 1}


def test_self_comparisons_stand_beside_the_verdict():
    result = gated([ok(JOB, steady())], [ok(JOB, steady(seed=3))])
    assert [some.name.partition(",")[0] for some in result.self_comparisons] == ["baseline", "candidate"]
    assert [some.num_compared for some in result.self_comparisons] == [1, 1]
    assert "0 false alarms in 1 jobs" in str(result.self_comparisons[0])


def test_a_machine_that_drifts_alarms_its_self_comparison():
    drifting = [1 + 0.01 * number for number in range(20)]
    result = gated([ok(JOB, drifting)], [ok(JOB, steady(20))])
    baseline, candidate = result.self_comparisons
    assert (baseline.num_alarms, baseline.num_below) == (1, 1)
    assert (candidate.num_alarms, candidate.num_below) == (0, 0)
    one = gated([ok(JOB, [1.0])], [ok(JOB, [1.0])]).self_comparisons[0]
    assert "too few rounds" in str(one)


def test_smallest_effects_are_there_case_by_case():
    result = gated(
        [ok(JOB, steady()), ok(OTHER, steady(spread=0.1))], [ok(JOB, steady()), ok(OTHER, steady(spread=0.1))]
    )
    quiet, noisy = (job.time.smallest_effect for job in result.jobs)
    assert 0 < quiet < 0.03 < noisy < math.inf
    assert [job.verdict for job in result.jobs] == [Verdict.PASS, Verdict.INCONCLUSIVE]
