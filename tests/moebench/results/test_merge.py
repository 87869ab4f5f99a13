"""Merging folders loses no row. A job that two folders have is refused, unless the caller asks for the newest."""

import json

import pytest

from moebench.errors import ResultsError, UsageError
from moebench.results.folder import Result, open_result
from moebench.results.frame import load
from moebench.results.merge import merge, merged, save
from tests.moebench.gated import H200, changed, frame, job_of, ok

ONE, TWO = job_of(1), job_of(2)
OTHER = changed(cpu_model="other", env_id="other")


def result(*rows, environment=H200):
    return Result(frame(*rows), {environment.env_id: environment})


def row(job, time_ms=1.0, run_id="20261101-000000-a", env_id=H200.env_id):
    return ok(job, [time_ms], run_id=run_id, env_id=env_id)


def test_rows_and_environments_of_all():
    found = merged([result(row(ONE)), result(row(TWO, env_id="other"), environment=OTHER)], "ab", newest=False)
    assert list(found.frame["num_tokens"]) == [1, 2]
    assert found.environments == {H200.env_id: H200, "other": OTHER}
    assert list(found.frame.columns) == list(frame().columns)
    assert found.frame.dtypes.to_dict() == frame().dtypes.to_dict()


def test_a_job_in_two_results_is_refused_and_named():
    with pytest.raises(ResultsError, match="1 jobs stand in several results") as refused:
        merged([result(row(ONE), row(TWO)), result(row(ONE))], ["a", "b"], newest=False)
    for part in (f"'loop' on {ONE.case.case_id} in a and b", "--newest"):
        assert part in str(refused.value)


def test_the_newest_is_of_the_run_that_began_last_whatever_the_order():
    old, new = row(ONE, 1.0, "20261101-000000-a"), row(ONE, 2.0, "20261102-000000-a")
    for order in ((old, new), (new, old)):
        found = merged([result(some) for some in order], "ab", newest=True).frame
        assert list(found["time_ms"]) == [2.0]
    same = merged([result(row(ONE, 1.0)), result(row(ONE, 2.0))], "ab", newest=True).frame
    assert list(same["time_ms"]) == [2.0], "of equal ones the last given"


def test_an_id_stands_for_one_environment():
    one, two = result(row(ONE)), result(row(TWO), environment=changed(gpu={"name": "NVIDIA B200"}))
    with pytest.raises(ResultsError, match=r"different environments \(gpu NVIDIA H200"):
        merged([one, two], "ab", newest=False)


def test_sessions_keep_the_rounds_of_all(tmp_path):
    for day, time_ms in ((1, 1.0), (2, 3.0)):
        rows = [ok(ONE, [time_ms, time_ms + 1], run_id=f"2026110{day}-000000-a", env_id=H200.env_id, job_s=2.0)]
        save(result(*rows, *([row(TWO)] if day == 1 else [])), tmp_path / f"{day}")
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out", sessions=True)
    both, alone = load(tmp_path / "out").to_dict("records")
    assert (both["num_rounds"], both["time_ms"], both["job_s"]) == (2, 2.5, 4.0)
    assert list(both["sample_rounds"]) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert list(both["sample_sessions"]) == [0] * 6 + [1] * 6
    assert both["run_id"] == "20261101-000000-a | 20261102-000000-a"
    assert (alone["num_tokens"], alone["sample_sessions"]) == (2, None)
    with pytest.raises(ResultsError, match="20261101-000000-a is given twice"):
        merge([tmp_path / "out", tmp_path / "1"], tmp_path / "twice", sessions=True)


def test_sessions_of_two_environments_are_refused(tmp_path):
    save(result(row(ONE)), tmp_path / "a")
    save(result(row(ONE, run_id="20261102-000000-a", env_id="other"), environment=OTHER), tmp_path / "b")
    with pytest.raises(ResultsError, match="several values of env_id") as refused:
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", sessions=True)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_opens_again(tmp_path):
    for name, job, environment in (("a", ONE, H200), ("b", TWO, OTHER)):
        save(result(row(job, env_id=environment.env_id), environment=environment), tmp_path / name)
    out = tmp_path / "new" / "out"
    written = merge([tmp_path / "a", tmp_path / "b"], out)
    assert all(path.is_file() for path in written)
    assert open_result(out).environments == {H200.env_id: H200, "other": OTHER}
    assert list(load(out)["num_tokens"]) == [1, 2]
    sources = json.loads((out / "run.json").read_text())["merged"]
    assert [(some["path"], some["num_jobs"]) for some in sources] == [
        (str(tmp_path / "a"), 1),
        (str(tmp_path / "b"), 1),
    ]
    with pytest.raises(UsageError, match="not an empty folder"):
        merge([tmp_path / "a", tmp_path / "b"], out)


def test_the_parts_of_several_machines_keep_nodes_and_environments(tmp_path):
    """One part was measured by hand, the other on a cluster, whose rows name their nodes."""
    save(result(row(ONE)), tmp_path / "by-hand")
    of_cluster = ok(TWO, [1.0], env_id=OTHER.env_id, node="n1")
    save(result(of_cluster, environment=OTHER), tmp_path / "cluster")
    merge([tmp_path / "by-hand", tmp_path / "cluster"], tmp_path / "whole")
    whole = load(tmp_path / "whole")
    assert list(whole["env_id"]) == [H200.env_id, OTHER.env_id]
    assert list(whole["node"].isna()) == [True, False]
    assert whole["node"][1] == "n1"


def test_one_environment_is_where_a_run_has_it(tmp_path):
    save(result(row(ONE)), tmp_path / "a")
    assert (tmp_path / "a" / "environment.json").read_text() == H200.to_json()
    assert not (tmp_path / "a" / "environments").exists()
