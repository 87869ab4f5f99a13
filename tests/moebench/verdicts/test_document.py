"""The JSON document of a gate has every number, and null in place of infinity."""

import json

import pytest

from moebench.verdicts.document import GateDocument
from tests.moebench.gated import JOBS, gated, job_of, one_of_each, steady, waits


@pytest.fixture(scope="module")
def result():
    return one_of_each()


def test_json_has_every_number_and_no_infinity(result):
    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(GateDocument.of(result).to_json(), parse_constant=refuse)
    assert found["exit_code"] == 1
    assert found["counts"] == {"REGRESSED": 2, "MISSING": 1, "INCONCLUSIVE": 1, "NEW": 1, "PASS": 1}
    jobs = {job["case_id"]: job for job in found["jobs"]}
    slow = jobs[JOBS["slow"].case.case_id]
    assert slow["verdict"] == "REGRESSED"
    assert slow["time"]["ratio"] == pytest.approx(1.0512, rel=1e-3)
    assert slow["time"]["rounds"] == [10, 10]
    assert slow["peak_memory_bytes"] == {"baseline": 100_000_000, "candidate": 125_000_000}
    assert {some["measure"]: some["verdict"] for some in slow["findings"]}["memory"] == "REGRESSED"
    one = jobs[JOBS["one"].case.case_id]["time"]
    assert (one["smallest_effect"], one["low"], one["high"]) == (None, None, None)
    assert jobs[JOBS["gone"].case.case_id]["status"] == {"baseline": "ok", "candidate": None}
    assert jobs[JOBS["crash"].case.case_id]["status"]["candidate"] == "crash"
    baseline, candidate = found["self_comparisons"]
    assert baseline["num_compared"] == 4
    assert (candidate["num_alarms"], candidate["false_alarm_rate"]) == (0, 0)


def test_the_gpus_own_time_is_in_the_document_and_older_documents_lack_it(result, tmp_path):
    after = waits(job_of(), steady(seed=1), steady(time_ms=0.6, seed=2))
    found = json.loads(GateDocument.of(gated([waits(job_of(), steady(), steady(time_ms=0.5))], [after])).to_json())
    (job,) = found["jobs"]
    assert job["busy"]["ratio"] == pytest.approx(1.2, rel=1e-3)
    assert job["busy_ms"] == {"baseline": pytest.approx(0.5), "candidate": pytest.approx(0.6)}
    older = json.loads(GateDocument.of(result).to_json())
    assert [(job.pop("busy"), job.pop("busy_ms")) for job in older["jobs"]] == [
        (None, {"baseline": None, "candidate": None})
    ] * len(older["jobs"])
    (tmp_path / "gate.json").write_text(json.dumps(older))
    assert GateDocument.read(tmp_path / "gate.json").to_json() == GateDocument.of(result).to_json()
