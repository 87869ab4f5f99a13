"""An opened results folder has its rows and the environments in which they were measured."""

import json

import numpy as np
import pytest

from moebench.errors import ResultsError
from moebench.results.folder import environments_beside, open_result, rows_of
from moebench.results.frame import SAMPLE_COLUMNS, to_frame
from moebench.results.journal import Journal
from moebench.results.record import Status
from moebench.verdicts.findings import is_null
from tests.moebench.gated import H200, bad, job_of, ok, steady, waits

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


def test_rows_of_a_frame_are_those_of_pandas():
    rows = [waits(JOB, [1.5, 1.25], [0.5]), bad(job_of(128), Status.oom), ok(job_of(256), [2.5])]
    frame = to_frame(rows)
    for row, other in zip(rows_of(frame, samples=True), frame.to_dict("records"), strict=True):
        assert row.keys() == other.keys()
        for name, cell in row.items():
            expected = list(other[name]) if isinstance(cell, np.ndarray) else other[name]
            found = cell.tolist() if isinstance(cell, np.ndarray) else cell
            assert (found is None) == (expected is None), name
            assert (is_null(found) and is_null(expected)) or found == expected, name
    assert rows_of(frame)[0].keys() == set(frame) - set(SAMPLE_COLUMNS)
    assert rows_of(frame[:0], samples=True) == []
