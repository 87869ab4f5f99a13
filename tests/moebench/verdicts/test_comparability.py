"""Results are compared if their environments are the same or the caller allows the differences."""

from moebench.machine.comparability import Difference
from moebench.verdicts.comparability import Comparability
from moebench.verdicts.verdict import Verdict
from tests.moebench.gated import H200, changed, gated, job_of, ok, steady

JOB = job_of(64)
DIFFERENT = {
    "device": changed(device="cpu", gpus=(), num_threads=4),
    "gpu": changed(gpu={"name": "NVIDIA B200"}),
    "driver": changed(gpu={"driver_version": "590.1"}),
    "power": changed(gpu={"power_limit_w": 500.0}),
    "clocks": changed(gpu={"max_sm_clock_mhz": 1500}),
    "cpu": changed(cpu_model="another"),
    "python": changed(python="3.11.9"),
    "torch": changed(versions={"torch": "2.13.0"}),
    "deep_ep": changed(versions={"deep_ep": None}),
}


def judged(baseline, candidate, *allowed):
    two = candidate.model_copy(update={"env_id": "f"})
    one = baseline.model_copy(update={"env_id": "e"})
    comparability = Comparability({"e": one}, {"f": two}, frozenset(allowed))
    slow = steady(time_ms=1.05)
    result = gated([ok(JOB, steady())], [ok(JOB, slow, env_id="f")], comparability=comparability)
    return result, {finding.measure: finding for finding in result.jobs[0].findings}


def test_another_driver_is_incomparable_and_named():
    result, found = judged(H200, DIFFERENT["driver"])
    assert (found["time"].verdict, found["memory"].verdict) == (Verdict.INCOMPARABLE, Verdict.PASS)
    assert found["time"].reason == "driver 580.159.04 -> 590.1"
    assert found["parity"].verdict is Verdict.PASS
    assert [str(difference) for difference in result.differences] == ["driver 580.159.04 -> 590.1"]
    assert result.exit_code == 3


def test_what_is_allowed_is_compared_and_still_named():
    result, found = judged(H200, DIFFERENT["driver"], "driver")
    assert found["time"].verdict is Verdict.REGRESSED
    assert found["memory"].verdict is Verdict.PASS
    assert result.differences


def test_allowing_one_thing_does_not_allow_another():
    two = changed(DIFFERENT["driver"], versions={"torch": "2.13.0"})
    _, found = judged(H200, two, "driver")
    assert found["time"].reason == "torch 2.11.0+cu130 -> 2.13.0"
    _, found = judged(H200, two, "driver", "torch")
    assert found["time"].verdict is Verdict.REGRESSED
    assert found["memory"].verdict is Verdict.INCOMPARABLE, "another torch allocates otherwise"


def test_without_the_environments_the_fingerprint_is_what_differs():
    comparability = Comparability({}, {}, ())
    assert comparability.between("e", "e") == ()
    unknown = (Difference("env_id", "e", "f"),)
    assert comparability.forbidding(comparability.between("e", "f")) == unknown
    assert Comparability({}, {}, ("env_id",)).forbidding(unknown) == ()


def test_clocks_far_apart_are_a_difference_of_their_own():
    """A locked GPU clock is a difference. A clock that is a little lower because a kernel needs more power is not."""

    def found(clock, *allowed):
        rows = [ok(JOB, steady(), sm_clock_mhz=1980)], [ok(JOB, steady(time_ms=1.3), sm_clock_mhz=clock)]
        return gated(*rows, comparability=Comparability({}, {}, allowed)).jobs[0].finding("time")

    assert found(1500).verdict is Verdict.INCOMPARABLE
    assert found(1500).reason == "clocks 1980 MHz -> 1500 MHz"
    assert found(1500, "clocks").verdict is Verdict.REGRESSED
    assert found(1900).verdict is Verdict.REGRESSED
    assert found(None).verdict is Verdict.REGRESSED
