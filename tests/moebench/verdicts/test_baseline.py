"""The machine and software of a candidate decide which stored baseline is found. An update replaces single jobs."""

import pytest

from moebench.errors import ResultsError
from moebench.results.folder import Result
from moebench.results.merge import save
from moebench.verdicts.baseline import matching, name_of, named, stored, update
from moebench.verdicts.findings import sessions_of
from tests.moebench.gated import H200, changed, frame, job_of, ok, steady

ONE, TWO = job_of(1), job_of(2)
NAME = f"nvidia-h200-{H200.env_id}"


def row(job, rounds, day=1, env_id=H200.env_id):
    return ok(job, rounds, env_id=env_id, run_id=f"202611{day:02}-000000-a")


def folder(path, *rows, environment=H200):
    save(Result(frame(*rows), {environment.env_id: environment} if environment else {}), path)
    return path


def test_it_is_named_by_gpu_and_fingerprint(tmp_path):
    assert name_of(H200) == NAME
    assert name_of(changed(gpus=(), device="cpu")) == f"intel-r-xeon-r-processor-{H200.env_id}"
    baseline = update(folder(tmp_path / "run", row(ONE, steady())), tmp_path / "baselines")
    assert baseline.path == tmp_path / "baselines" / NAME
    (there,) = stored(tmp_path / "baselines")
    assert (there.name, there.environment, there.rounds) == (NAME, H200, (10, 10))
    assert there.as_dict()["driver"] == "580.159.04"
    assert there.as_dict()["torch"] == "2.11.0+cu130"


def test_an_update_replaces_the_jobs_it_has_and_keeps_the_others(tmp_path):
    root = tmp_path / "baselines"
    update(folder(tmp_path / "a", row(ONE, steady()), row(TWO, steady(8))), root)
    update(folder(tmp_path / "b", row(ONE, steady(20, 2.0), day=2)), root)
    (there,) = stored(root)
    times = dict(zip(there.result.frame["num_tokens"], there.result.frame["time_ms"], strict=True))
    assert times == {1: pytest.approx(2.0), 2: pytest.approx(1.0)}
    assert there.rounds == (8, 20)


def test_an_update_with_an_older_run_replaces_too_and_says_what(tmp_path):
    """The user named the run, so the baseline takes it."""
    root = tmp_path / "baselines"
    update(folder(tmp_path / "new", row(ONE, steady(), day=9), row(TWO, steady(), day=9)), root)
    changed_one = update(folder(tmp_path / "old", row(ONE, steady(20, 2.0), day=2)), root)
    assert changed_one.replaced == ("1 jobs of run 20261109-000000-a by run 20261102-000000-a",)
    (there,) = stored(root)
    times = dict(zip(there.result.frame["num_tokens"], there.result.frame["time_ms"], strict=True))
    assert times == {1: pytest.approx(2.0), 2: pytest.approx(1.0)}


def test_several_runs_are_sessions_and_more_can_be_added(tmp_path):
    root = tmp_path / "baselines"
    days = [folder(tmp_path / f"{day}", row(ONE, steady(5, 1 + day / 100), day=day)) for day in (1, 2, 3)]
    update(days[:2], root)
    found = update([days[2]], root, add=True)
    (there,) = stored(root)
    assert (found.replaced, there.rounds, there.as_dict()["sessions"]) == ((), (15, 15), 3)
    assert there.as_dict()["runs"] == "20261101-000000-a, 20261102-000000-a, 20261103-000000-a"
    (stored_row,) = there.result.frame.to_dict("records")
    assert stored_row["time_ms"] == pytest.approx(1.02, rel=1e-3)
    assert list(sessions_of(stored_row).values()) == [0] * 5 + [1] * 5 + [2] * 5
    with pytest.raises(ResultsError, match="20261103-000000-a is given twice"):
        update([days[2]], root, add=True)
    assert update(days[0], root).rounds == (5, 5), "without `add` the run replaces all sessions"


def test_machines_have_baselines_of_their_own(tmp_path):
    root = tmp_path / "baselines"
    other = changed(gpu={"name": "NVIDIA B200"}, env_id="other")
    update(folder(tmp_path / "a", row(ONE, steady())), root)
    update(folder(tmp_path / "b", row(ONE, steady(), env_id="other"), environment=other), root)
    assert [some.name for some in stored(root)] == ["nvidia-b200-other", NAME]
    candidate = Result(frame(row(ONE, steady())), {})
    assert matching(candidate, root).name == NAME
    assert named("nvidia-b200-other", root).environment == other


def test_what_is_not_there_is_one_line_with_what_is(tmp_path):
    root = tmp_path / "baselines"
    candidate = Result(frame(row(ONE, steady(), env_id="x")), {})
    with pytest.raises(ResultsError, match="there are none"):
        matching(candidate, root)
    update(folder(tmp_path / "a", row(ONE, steady())), root)
    with pytest.raises(ResultsError, match=NAME):
        matching(candidate, root)
    with pytest.raises(ResultsError, match=NAME):
        named("nothing", root)


def test_results_of_no_or_several_environments_are_refused(tmp_path):
    root = tmp_path / "baselines"
    with pytest.raises(ResultsError, match="describe none; a baseline"):
        update(folder(tmp_path / "a", row(ONE, steady()), environment=None), root)
    with pytest.raises(ResultsError, match="needs one environment and its file"):
        update(folder(tmp_path / "b", row(ONE, steady()), row(TWO, steady(), env_id="x")), root)
    assert not root.exists()
