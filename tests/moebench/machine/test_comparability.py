"""What two environments differ in has a name, and exactly what env_id hashes counts."""

import json

import pytest

from moebench.errors import ResultsError
from moebench.machine.comparability import CHANGES, Difference, differences, facts
from moebench.results.folder import environments_beside, open_result
from moebench.results.journal import Journal
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


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_difference_has_its_name(what):
    found = differences(H200, DIFFERENT[what])
    assert what in [difference.what for difference in found]
    if what != "device":
        assert len(found) == 1
    assert DIFFERENT[what].comparable() != H200.comparable()


@pytest.mark.parametrize(
    "same",
    [
        changed(num_threads=99),
        changed(python="3.12.9"),
        changed(git_revision="other"),
        changed(gpu={"sm_clock_mhz": 1}),
        changed(device="cuda"),
    ],
)
def test_what_does_not_count_is_no_difference(same):
    assert differences(H200, same) == ()
    assert same.comparable() == H200.comparable()


def test_threads_count_on_a_cpu():
    one = changed(device="cpu", gpus=())
    (difference,) = differences(one, changed(one, num_threads=99))
    assert difference == Difference("threads", "4", "99")


def test_every_fact_may_be_allowed_to_change():
    assert tuple(facts(H200)) == CHANGES


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
    """As of a GPU whose clock somebody locked; what a kernel's own power costs is none."""

    def found(clock, *allowed):
        rows = [ok(JOB, steady(), sm_clock_mhz=1980)], [ok(JOB, steady(time_ms=1.3), sm_clock_mhz=clock)]
        return gated(*rows, comparability=Comparability({}, {}, allowed)).jobs[0].finding("time")

    assert found(1500).verdict is Verdict.INCOMPARABLE
    assert found(1500).reason == "clocks 1980 MHz -> 1500 MHz"
    assert found(1500, "clocks").verdict is Verdict.REGRESSED
    assert found(1900).verdict is Verdict.REGRESSED
    assert found(None).verdict is Verdict.REGRESSED


def test_the_environments_beside_results(tmp_path):
    Journal(tmp_path / "journal.jsonl").append(ok(JOB, steady()))
    assert open_result(tmp_path).environments == {}
    (tmp_path / "environment.json").write_text(H200.to_json())
    (tmp_path / "environments").mkdir()
    other = H200.model_copy(update={"env_id": "other"})
    (tmp_path / "environments" / "other.json").write_text(other.to_json())
    assert open_result(tmp_path).environments == {H200.env_id: H200, "other": other}
    assert environments_beside(tmp_path / "results.parquet").keys() == {H200.env_id, "other"}


def test_what_is_no_environment_is_one_line(tmp_path):
    (tmp_path / "environment.json").write_text(json.dumps({"env_id": "e"}))
    with pytest.raises(ResultsError, match="open it with the moebench that wrote it") as refused:
        environments_beside(tmp_path)
    assert "\n" not in str(refused.value)


def test_results_without_rows_are_refused(tmp_path):
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(ResultsError, match="no rows"):
        open_result(tmp_path)
