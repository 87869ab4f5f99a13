"""An opened results folder has its rows and the environments in which they were measured."""

import json

import pytest

from moebench.errors import ResultsError
from moebench.results.folder import environments_beside, open_result
from moebench.results.journal import Journal
from tests.moebench.gated import H200, job_of, ok, steady

JOB = job_of(64)


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
