"""Findings compare memory to the byte and parity by status, and name the rows that may not be compared."""

from types import SimpleNamespace

import pytest

from moebench.machine.comparability import Difference
from moebench.results.record import Status
from moebench.verdicts import findings
from moebench.verdicts.findings import Pair, of_pair, rounds_of
from moebench.verdicts.verdict import Verdict
from moebench.workload.case import Case
from tests.moebench.gated import bad, frame, job_of, ok, steady

JOB = job_of(mode="train")
DRIVER = Difference("driver", "580", "590")
TE = Difference("transformer_engine", "2.20", "2.21")
TORCH = Difference("torch", "2.11", "2.13")


def rows(*records):
    return [frame(row).to_dict("records")[0] for row in records]


def pair(one, two, differences=(), forbidding=()):
    return Pair(*rows(one, two), differences, forbidding)


def found(one, two, measure, **differing):
    return {finding.measure: finding for finding in of_pair(pair(one, two, **differing), None)}[measure]


def memory(before, after, gpu=None, **differing):
    names = ("peak_memory_bytes", "saved_memory_bytes")
    one, two = (ok(JOB, steady(), **{**dict(zip(names, some, strict=True)), "gpu": gpu}) for some in (before, after))
    return found(one, two, "memory", **differing)


def test_one_byte_more_is_a_regression():
    assert memory((100, 50), (100, 50)).verdict is Verdict.PASS
    assert memory((100, 50), (101, 50)).verdict is Verdict.REGRESSED
    assert memory((100, 50), (100, 51)).verdict is Verdict.REGRESSED
    assert memory((100, 50), (99, 50)).verdict is Verdict.IMPROVED
    assert memory((100, 50), (90, 51)).verdict is Verdict.REGRESSED, "less peak does not pay for more saved"
    assert memory((25 << 20, 50), (50 << 20, 50)).reason == "peak 25.0 MiB -> 50.0 MiB"
    assert memory((25 << 20, 50), ((25 << 20) + 64, 50)).reason == "peak 25.0 MiB, 64 B more"


def test_on_a_gpu_what_the_allocator_varies_is_no_change():
    mib = 1 << 20
    for before, least in ((40 * mib, 2 * mib), (1000 * mib, 10 * mib)):
        assert memory((before, 0), (before + least, 0), gpu="NVIDIA H200").verdict is Verdict.PASS
        assert memory((before, 0), (before + least + 1, 0), gpu="NVIDIA H200").verdict is Verdict.REGRESSED
        assert memory((before, 0), (before - least - 1, 0), gpu="NVIDIA H200").verdict is Verdict.IMPROVED
        assert memory((0, before), (0, before + least + 1), gpu="NVIDIA H200").verdict is Verdict.REGRESSED


def test_what_was_not_measured_is_not_judged():
    assert memory((100, None), (100, None)).verdict is Verdict.PASS
    nothing = memory((None, None), (None, None))
    assert (nothing.verdict, "nothing was compared" in nothing.reason) == (Verdict.UNMEASURED, True)
    assert memory((None, None), (100, 50)).verdict is Verdict.UNMEASURED


@pytest.mark.parametrize("after", [(None, 50), (100, None), (None, None)])
def test_figures_that_only_the_baseline_has_never_pass(after):
    finding = memory((100, 50), after)
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert finding.reason.startswith("only the baseline has a figure of memory: ")


def test_memory_needs_the_same_torch_and_gpu_even_where_times_may_be_compared():
    assert memory((100, 50), (999, 50), differences=(DRIVER,)).verdict is Verdict.REGRESSED
    assert memory((100, 50), (999, 50), differences=(TORCH,)).verdict is Verdict.INCOMPARABLE
    assert memory((100, 50), (999, 50), differences=(DRIVER,), forbidding=(DRIVER,)).verdict is Verdict.REGRESSED
    assert memory((100, 50), (999, 50), differences=(TE,), forbidding=(TE,)).verdict is Verdict.INCOMPARABLE
    assert memory((100, 50), (999, 50), differences=(TE,)).verdict is Verdict.REGRESSED


@pytest.mark.parametrize("status", [Status.mismatch, Status.crash, Status.timeout, Status.error])
def test_what_is_wrong_is_a_regression_whatever_it_was(status):
    for before in (ok(JOB, steady()), bad(JOB, status), bad(JOB, Status.oom)):
        finding = found(before, bad(JOB, status), "parity", differences=(TORCH,), forbidding=(TORCH,))
        assert finding.verdict is Verdict.REGRESSED
        assert f"{status}: why" in finding.reason
        assert "more" not in finding.reason
    assert f"also {status} in the baseline" in found(bad(JOB, status), bad(JOB, status), "parity").reason


@pytest.mark.parametrize("status", [Status.oom, Status.unsupported])
def test_what_no_longer_runs_is_a_regression_on_the_same_machine(status):
    before, after = ok(JOB, steady()), bad(JOB, status)
    assert found(before, after, "parity").verdict is Verdict.REGRESSED
    assert found(before, after, "parity", differences=(TORCH,), forbidding=(TORCH,)).verdict is Verdict.INCOMPARABLE
    assert found(after, before, "parity").verdict is Verdict.IMPROVED


@pytest.mark.parametrize("status", [Status.oom, Status.unsupported])
def test_what_ran_on_neither_side_is_not_a_pass(status):
    finding = found(bad(JOB, status), bad(JOB, status), "parity")
    assert (finding.verdict, finding.reason) == (
        Verdict.UNMEASURED, f"neither side ran, so there was nothing to compare: {status}: why"
    )  # fmt: skip


@pytest.mark.parametrize("status", [Status.crash, Status.oom, Status.mismatch])
def test_a_baseline_that_failed_has_no_time_to_compare_with(status):
    findings = of_pair(pair(bad(JOB, status), ok(JOB, steady())), None)
    verdicts = {finding.measure: finding.verdict for finding in findings}
    assert verdicts == {"time": Verdict.UNMEASURED, "parity": Verdict.IMPROVED}
    assert f"no time and no memory ({status})" in findings[0].reason


def test_a_candidate_that_did_not_run_has_a_finding_on_parity_alone():
    assert [some.measure for some in of_pair(pair(ok(JOB, steady()), bad(JOB, Status.oom)), None)] == ["parity"]


def test_the_same_measurement_on_both_sides_is_not_compared():
    row = ok(JOB, steady())
    assert pair(row, ok(JOB, steady(seed=1))).why_incomparable == ""
    assert "the same measurement (run 20261123-000000-a)" in pair(row, row).why_incomparable
    renamed = ok(JOB, steady(), run_id="20261124-000000-b")
    assert "(run 20261124-000000-b)" in pair(row, renamed).why_incomparable
    longer = ok(JOB, [*steady(), 1.1, 1.2])
    assert pair(row, longer).same_measurement, "a copy that was resumed"
    two_sessions = ok(JOB, [*steady(seed=5), *steady()])
    assert pair(two_sessions, row).same_measurement, "a run that is a session of the baseline"
    assert Pair(*rows(row, row), together=True).why_incomparable == "", "`ab` numbers its processes itself"
    assert found(row, row, "time").verdict is Verdict.INCOMPARABLE


def test_a_flag_that_one_side_has_forbids_a_comparison_unless_it_is_harmless():
    plain, odd = ok(JOB, steady()), ok(JOB, steady(seed=1), flags=("changed_settings",))
    for one, two, side in ((plain, odd, "candidate"), (odd, plain, "baseline")):
        assert pair(one, two).why_incomparable.startswith(f"only the {side} has the flag changed_settings")
    assert pair(ok(JOB, steady(), flags=("changed_settings",)), odd).why_incomparable == ""
    assert pair(plain, ok(JOB, steady(seed=1), flags=("synchronises", "clock_changed"))).why_incomparable == ""


def test_a_time_from_another_node_is_compared_and_says_so():
    one, two = (ok(JOB, steady(seed=seed), node=name) for seed, name in enumerate(("n1", "n2")))
    words = "the baseline is of another node (n1 -> n2)"
    assert pair(one, two).why_incomparable == ""
    assert pair(one, two).elsewhere == words
    assert pair(one, ok(JOB, steady(seed=1), node="n1")).elsewhere == ""
    assert pair(one, ok(JOB, steady(seed=1))).elsewhere == "", "a row without a cluster"
    passed = SimpleNamespace(verdict=Verdict.PASS, reason="")
    assert [some.reason for some in of_pair(pair(one, two), passed) if some.measure == "time"] == [words]


def test_why_times_are_not_compared():
    same, again = ok(JOB, steady()), ok(JOB, steady(seed=1))
    assert pair(same, again).why_incomparable == ""
    assert pair(same, again, (DRIVER,), (DRIVER,)).why_incomparable == "driver 580 -> 590"
    assert pair(same, again, (DRIVER,)).why_incomparable == ""
    assert pair(same, ok(JOB, steady(), l2="warm")).why_incomparable == "L2 cold -> warm"
    assert pair(ok(JOB, steady(), l2=None), ok(JOB, steady(seed=1), l2=None)).why_incomparable == ""
    hot = ok(JOB, steady(), flags=("synchronises", "slowed_down"))
    assert pair(same, hot).why_incomparable == "candidate slowed down by heat or a power brake; measure it again"
    old = ok(JOB, steady(), flags=("impossibly_fast",), schema=1)
    assert pair(old, old).why_incomparable.startswith("baseline impossibly fast; measure it again, candidate")
    finding = found(same, ok(JOB, steady(), l2="warm"), "time")
    assert (finding.verdict, finding.reason) == (Verdict.INCOMPARABLE, "L2 cold -> warm")


def test_times_and_memory_of_two_schemas_are_not_compared_and_parity_is():
    one, two = ok(JOB, steady(), schema=1), ok(JOB, steady(), peak_memory_bytes=1)
    why = "schema 1 -> 2: moebench measures differently since; measure both again"
    for measure in ("time", "memory"):
        assert (found(one, two, measure).verdict, found(one, two, measure).reason) == (Verdict.INCOMPARABLE, why)
    assert found(one, two, "parity").verdict is Verdict.PASS
    old = ok(JOB, steady(), schema=1)
    assert pair(old, ok(JOB, steady(seed=1), schema=1)).why_incomparable == ""
    assert found(old, old, "memory").verdict is Verdict.PASS


def test_the_job_of_a_row():
    job = job_of(backend="te", dispatcher="deepep", ep_size=2, mode="train", routing="zipf:1.2", masked_share=0.25)
    (row,) = rows(ok(job, steady()))
    assert findings.job_of(row) == job
    assert findings.job_of(row).case.case_id == row["case_id"]
    preset = job.model_copy(update={"case": Case(**{**job.case.model_dump(), "model": "qwen3-30b-a3b"})})
    assert findings.job_of(*rows(ok(preset, steady()))) == preset


def test_rounds_of_a_row():
    (row,) = rows(ok(JOB, [2.0, 1.0, 4.0]))
    assert list(rounds_of(row).values()) == pytest.approx([2.0, 1.0, 4.0])
    (marked,) = rows(ok(JOB, [2.0, 8.0], sample_marked=(True, False, True, True, True, True)))
    assert list(rounds_of(marked).values()) == pytest.approx([2.0, 8.0]), "a round of marked samples alone keeps them"
    (other,) = rows(ok(JOB, [2.0, 8.0], sample_marked=(False, False, True, False, False, False)))
    assert list(rounds_of(other).values()) == pytest.approx([1.9, 8.0])
    (failed,) = rows(bad(JOB, Status.oom))
    assert rounds_of(failed) == {}
