"""A gate judges the time, memory and parity of every job of two results, and gives one exit code."""

import math

import pytest

from moebench.errors import ResultsError
from moebench.results.record import Status
from moebench.verdicts.comparability import Comparability
from moebench.verdicts.verdict import Verdict
from tests.moebench.gated import H200, bad, changed, gated, job_of, ok, steady, waits

JOB, OTHER, THIRD = job_of(64), job_of(128), job_of(256)
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
    assert only(gated([ok(JOB, SLOW, **samples)], [ok(JOB, steady(), **samples)])).time.rounds == (1, 1)


def test_a_regression_outweighs_what_is_open():
    result = gated([ok(JOB, steady()), ok(OTHER, [1.0])], [ok(JOB, SLOW), ok(OTHER, [1.1])])
    assert result.counts == {Verdict.REGRESSED: 1, Verdict.INCONCLUSIVE: 1}
    assert result.exit_code == 1


def test_new_and_missing_jobs():
    result = gated([ok(JOB, steady()), ok(OTHER, steady())], [ok(JOB, steady(seed=1))])
    assert [job.verdict for job in result.jobs] == [Verdict.PASS, Verdict.MISSING]
    assert result.exit_code == 1
    result = gated([ok(JOB, steady())], [ok(JOB, steady(seed=1)), ok(OTHER, steady())])
    assert [job.verdict for job in result.jobs] == [Verdict.PASS, Verdict.NEW]
    assert result.exit_code == 0
    result = gated([ok(JOB, steady())], [ok(JOB, steady(seed=1)), bad(OTHER, Status.mismatch)])
    assert verdicts(result.jobs[1]) == {"job": Verdict.NEW, "parity": Verdict.REGRESSED}
    assert result.exit_code == 1


def test_the_backend_and_dispatcher_are_part_of_a_job():
    one, two = (
        job_of(backend="te", ep_size=2, dispatcher="deepep"),
        job_of(backend="te", ep_size=2, dispatcher="alltoall"),
    )
    result = gated([ok(JOB, steady()), ok(one, steady())], [ok(JOB, steady(seed=1)), ok(two, steady())])
    assert [job.verdict for job in result.jobs] == [Verdict.PASS, Verdict.MISSING, Verdict.NEW]
    assert [job.backend for job in result.jobs] == ["loop", "te+deepep", "te+alltoall"]


def test_no_job_in_common_is_one_line():
    with pytest.raises(ResultsError, match="no job in common") as refused:
        gated([ok(JOB, steady())], [ok(OTHER, steady())])
    assert "\n" not in str(refused.value)


def test_the_family_is_what_is_compared():
    """Twenty quiet rounds per side are enough for 200 jobs. Eight are enough for a single job, but not for 200."""
    jobs = [job_of(number) for number in range(1, 201)]

    def of(num_rounds, factor, first_seed=0):
        seeds = range(first_seed, first_seed + len(jobs))
        rounds = [steady(num_rounds, factor if seed == first_seed else 1.0, 0.002, seed) for seed in seeds]
        return [ok(job, some) for job, some in zip(jobs, rounds, strict=True)]

    assert gated(of(20, 1), of(20, 1.05, 200)).counts == {Verdict.REGRESSED: 1, Verdict.PASS: 199}
    assert gated(of(8, 1), of(8, 1.05, 200)).counts == {Verdict.INCONCLUSIVE: 200}
    assert gated(of(8, 1)[:1], of(8, 1.05, 200)[:1]).counts == {Verdict.REGRESSED: 1}


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
        [ok(JOB, steady()), ok(OTHER, steady(spread=0.1))],
        [ok(JOB, steady(seed=1)), ok(OTHER, steady(spread=0.1, seed=1))],
    )
    quiet, noisy = (job.time.smallest_effect for job in result.jobs)
    assert 0 < quiet < 0.03 < noisy < math.inf
    assert [job.verdict for job in result.jobs] == [Verdict.PASS, Verdict.INCONCLUSIVE]


# A gate that compared nothing is not green


@pytest.mark.parametrize("status", [Status.unsupported, Status.oom])
def test_jobs_that_ran_on_neither_side_are_exit_code_3_and_said(status):
    rows = [bad(job, status) for job in (JOB, OTHER)]
    result = gated(rows, rows)
    assert result.counts == {Verdict.UNMEASURED: 2}
    assert (result.exit_code, result.compared_nothing) == (3, True)
    assert result.notes[0].startswith("nothing was compared")
    measured = gated([*rows, ok(THIRD, steady())], [*rows, ok(THIRD, steady(seed=1))])
    assert measured.counts == {Verdict.UNMEASURED: 2, Verdict.PASS: 1}
    assert measured.exit_code == 0, "a job that no side can run does not spoil the gate"


def test_a_baseline_without_a_time_is_not_improved_upon():
    result = gated([bad(job, Status.crash) for job in (JOB, OTHER)], [ok(job, steady()) for job in (JOB, OTHER)])
    assert (result.counts, result.exit_code) == ({Verdict.UNMEASURED: 2}, 3)


def test_a_result_is_not_compared_with_itself():
    rows = [ok(job, steady(seed=job.case.num_tokens)) for job in (JOB, OTHER)]
    result = gated(rows, rows)
    assert (result.counts, result.exit_code) == ({Verdict.INCOMPARABLE: 2}, 3)
    assert "the same measurement" in result.jobs[0].finding("time").reason


def test_another_gpu_is_named_whatever_the_env_id_says():
    two = changed(gpu={"name": "NVIDIA B200"})
    comparability = Comparability({"e": H200}, {"e": two})
    result = gated([ok(JOB, steady())], [ok(JOB, steady(seed=1))], comparability=comparability)
    assert result.exit_code == 3
    assert "gpu NVIDIA H200" in only(result).finding("time").reason
    result = gated([ok(JOB, steady())], [ok(JOB, steady(seed=1), gpu="NVIDIA B200")])
    assert only(result).finding("time").reason == "gpu NVIDIA H200 -> NVIDIA B200"
    assert verdicts(only(result))["memory"] is Verdict.INCOMPARABLE


def test_a_lower_clock_is_named_beside_the_longer_time():
    result = gated([ok(JOB, steady(), sm_clock_mhz=1980)], [ok(JOB, steady(time_ms=1.06), sm_clock_mhz=1850)])
    finding = only(result).finding("time")
    assert finding.verdict is Verdict.REGRESSED
    assert finding.reason == "slower; the GPU's clock was 6.6% lower (1980 -> 1850 MHz)"
    same = gated([ok(JOB, steady(), sm_clock_mhz=1980)], [ok(JOB, SLOW, sm_clock_mhz=1975)])
    assert only(same).finding("time").reason == "slower"


# Rounds that depend on one another, and sessions


def test_rounds_in_the_order_of_a_drift_show_nothing():
    """Each side drifts by 2% while it is measured. In random order the same times show a slowdown of 6%."""
    drift = [1 + 0.001 * number for number in range(20)]
    mixed = steady(20, 1.01, 0.019 / 1.01)
    assert sorted(mixed) == pytest.approx(drift, rel=1e-3)
    slow = [1.06 * time for time in drift]
    assert only(gated([ok(JOB, mixed)], [ok(JOB, [1.06 * some for some in mixed[::-1]])])).verdict is Verdict.REGRESSED
    job = only(gated([ok(JOB, drift)], [ok(JOB, slow)]))
    assert job.verdict is Verdict.INCONCLUSIVE
    assert "depend on one another" in job.finding("time").reason
    assert "moebench ab" in job.finding("time").reason
    assert job.time.correlation == 1


def test_one_session_a_side_is_said_and_several_count():
    def of(offset, *sessions, seed=0):
        rounds = [1 + offset + shift + 0.0002 * number for shift in sessions for number in (0, 2, 1, 3)]
        numbers = tuple(session for session in range(len(sessions)) for _ in range(4) for _ in range(3))
        return [ok(JOB, rounds, sample_sessions=numbers, run_id=f"2026112{seed}-000000-a")]

    shifts = (0.0, 0.004, -0.003, 0.002, -0.004, 0.001)
    one = gated(of(0.0, 0.0), of(0.05, 0.0, seed=1))
    assert "both sides have one session: shifts of the machine" in " ".join(one.notes)
    assert only(one).time.sessions == (1, 1)
    found = gated(of(0.0, *shifts), of(0.05, 0.0))
    assert (found.notes, only(found).time.sessions) == ((), (6, 1))
    assert only(found).verdict is Verdict.REGRESSED
    large = [3 * shift for shift in shifts]
    assert only(gated(of(0.0, *large), of(0.03, 0.0))).verdict is Verdict.INCONCLUSIVE, "days differ by as much"
    few = only(gated(of(0.0, 0.0, 0.004), of(0.012, 0.0)))
    assert "2 and 1 sessions are too few" in few.finding("time").reason


# The GPU's own time of calls that wait for the GPU

NOISY = {"spread": 0.3}


def busy(time, own, seed=0, job=JOB, **measured):
    """Return a row with rounds of this time, and with the GPU's own time in each round."""
    return waits(job, time, own, run_id=f"2026112{seed}-000000-a", **measured)


def test_the_gate_judges_the_time_and_the_gpus_own_time():
    before = busy(steady(time_ms=3.0), steady())
    same = only(gated([before], [busy(steady(time_ms=3.0, seed=1), steady(seed=2))]))
    assert verdicts(same) == dict.fromkeys(("time", "busy", "memory", "parity"), Verdict.PASS)
    assert same.verdict is Verdict.PASS
    slow = gated([before], [busy(steady(time_ms=3.0, seed=1), steady(time_ms=1.05, seed=2))])
    assert (verdicts(only(slow))["time"], verdicts(only(slow))["busy"]) == (Verdict.PASS, Verdict.REGRESSED)
    assert (only(slow).verdict, slow.exit_code) == (Verdict.REGRESSED, 1)
    assert only(slow).busy.ratio == pytest.approx(1.05, rel=1e-3)
    assert only(slow).finding("busy").reason == "slower"
    fast = only(gated([before], [busy(steady(time_ms=3.0, seed=1), steady(time_ms=0.9, seed=2))]))
    assert (fast.verdict, verdicts(fast)["busy"]) == (Verdict.IMPROVED, Verdict.IMPROVED)


def test_a_quiet_gpu_does_not_make_a_noisy_time_green():
    before = busy(steady(time_ms=3.0, **NOISY), steady())
    result = gated([before], [busy(steady(time_ms=3.0, seed=1, **NOISY), steady(seed=2))])
    assert (verdicts(only(result))["time"], verdicts(only(result))["busy"]) == (Verdict.INCONCLUSIVE, Verdict.PASS)
    assert (only(result).verdict, result.exit_code) == (Verdict.INCONCLUSIVE, 3)
    assert only(result).finding("time").reason.endswith("; the GPU's own time (busy_ms): PASS")


def test_a_regression_of_the_gpus_own_time_is_found_where_the_time_is_too_noisy():
    before = busy(steady(time_ms=3.0, **NOISY), steady())
    result = gated([before], [busy(steady(time_ms=3.0, seed=1, **NOISY), steady(time_ms=1.06, seed=2))])
    assert verdicts(only(result))["time"] is Verdict.INCONCLUSIVE
    assert (only(result).verdict, result.exit_code) == (Verdict.REGRESSED, 1)


def test_a_time_that_grows_on_the_host_is_a_regression_and_says_that_the_gpu_did_not_change():
    before = busy(steady(time_ms=3.0), steady())
    result = gated([before], [busy(steady(time_ms=3.2, seed=1), steady(seed=2))])
    assert (only(result).verdict, result.exit_code) == (Verdict.REGRESSED, 1)
    assert only(result).finding("time").reason == "slower; the GPU's own time (busy_ms): PASS"


def test_a_quiet_time_does_not_make_a_noisy_gpu_green():
    before = busy(steady(time_ms=3.0), steady(**NOISY))
    result = gated([before], [busy(steady(time_ms=3.0, seed=1), steady(seed=2, **NOISY))])
    assert (verdicts(only(result))["time"], verdicts(only(result))["busy"]) == (Verdict.PASS, Verdict.INCONCLUSIVE)
    assert result.exit_code == 3


def test_both_times_are_in_one_family_of_tests():
    """Five blocks of two rounds a side allow a p-value of 6⁻⁵. It shows a change among 38 tests, and not among 76."""
    jobs = [job_of(number) for number in range(1, 39)]

    def of(own, seed, slow=1.0):
        times = {job: steady(10, slow if job is jobs[0] else 1.0, 0.002, seed) for job in jobs}
        return [busy(times[job], [2.0] * own, seed, job) for job in jobs]

    for own, verdict in ((0, Verdict.REGRESSED), (10, Verdict.INCONCLUSIVE)):
        result = gated(of(own, 1), of(own, 2, 1.5), block_of=lambda number: number // 2)
        assert verdicts(result.jobs[0])["time"] is verdict


@pytest.mark.parametrize(
    ("before", "after", "flags", "verdict", "reason"),
    [
        ([], steady(), ("synchronises",), Verdict.UNMEASURED, "the baseline has no busy_ms"),
        (steady(), [], ("synchronises", "no_busy_time"), Verdict.INCONCLUSIVE, "only the baseline has busy_ms"),
        (steady(), [], (), Verdict.UNMEASURED, "the candidate's call does not wait for the GPU"),
        (steady(), [1.0], ("synchronises", "no_busy_time"), Verdict.INCONCLUSIVE, "10 and 1 rounds"),
        ([], [], ("synchronises",), None, ""),
    ],
)
def test_a_side_without_the_gpus_own_time_never_passes(before, after, flags, verdict, reason):
    result = gated([busy(steady(), before)], [busy(steady(seed=1), after, 1, flags=flags)])
    assert verdicts(only(result))["time"] is Verdict.PASS
    assert verdicts(only(result)).get("busy") is verdict
    if verdict is None:
        assert only(result).verdict is Verdict.PASS
    else:
        assert only(result).verdict is verdict
        assert reason in only(result).finding("busy").reason


def test_what_forbids_to_compare_times_forbids_it_for_the_gpus_own_time():
    job = only(gated([busy(steady(), steady())], [busy(steady(seed=1), steady(seed=2), l2="warm")]))
    assert job.busy is None
    assert (job.finding("busy").verdict, job.finding("busy").reason) == (Verdict.INCOMPARABLE, "L2 cold -> warm")


def test_sessions_and_self_comparisons_are_those_of_both_times():
    drifting = [1 + 0.01 * number for number in range(20)]
    sessions = tuple(session for session in range(4) for _ in range(15))
    before = busy(steady(20), drifting, sample_sessions=sessions)
    result = gated([before], [busy(steady(20, seed=1), steady(19, seed=2), 1)])
    assert only(result).busy.sessions == (4, 1)
    assert only(result).busy.rounds == (20, 19), "a round may lack it"
    names = {some.name: some.num_alarms for some in result.self_comparisons}
    side = "baseline, earlier against later rounds"
    assert (names[side], names[f"{side}, busy_ms"]) == (0, 1)
    assert len(names) == 4


def test_rounds_without_a_common_block_show_nothing():
    before, after = busy(steady(4), [1.0, 1.0]), busy(steady(4, seed=1), [2.0, 2.0], 1)
    late = after.model_copy(update={"busy_sample_rounds": (2, 2, 2, 3, 3, 3)})
    job = only(gated([before], [late], block_of=lambda number: number // 2))
    assert (job.finding("busy").verdict, job.busy.rounds) == (Verdict.INCONCLUSIVE, (0, 0))
    both = only(gated([before], [after], block_of=lambda number: number // 2))
    assert both.busy.rounds == (2, 2)
