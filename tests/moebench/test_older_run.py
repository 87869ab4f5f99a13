"""moebench opens and completes a run that it wrote while all its modules lay in one folder.

Revision 6503759 wrote tests/data/older-run: `moebench run tiny.toml --rounds 2 --out out --device cpu`. The run was
interrupted after five of its eight jobs. Its logs and plots are left out.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

import moebench as public
from moebench.results.journal import Journal
from moebench.results.rounds import OTHER_ENVIRONMENT
from tests.moebench import stand_in

ROOT = Path(__file__).parents[2]
OLDER = ROOT / "tests" / "data" / "older-run"
#: Tokens, backend and round of the jobs that were measured then, and of the jobs that were left.
MEASURED = [(8, "torch_mm", 0), (8, "loop", 0), (16, "torch_mm", 0), (16, "loop", 0), (16, "loop", 1)]
LEFT = [(8, "loop", 1), (8, "torch_mm", 1), (16, "torch_mm", 1)]


@pytest.fixture
def older(tmp_path):
    """Copy the folder into the working folder of the fixture `moebench`."""
    shutil.copytree(OLDER, tmp_path / "out")
    return tmp_path / "out"


def jobs_of(rows):
    return [(row.num_tokens, row.backend, row.round) for row in rows]


@pytest.mark.parametrize("file", [".", "results.parquet"])
def test_it_opens(older, file):
    result = public.open_result(older / file)
    frame = result.frame
    assert sorted(zip(frame["num_tokens"], frame["backend"], strict=True)) == [
        (tokens, name) for tokens in (8, 16) for name in ("loop", "torch_mm")
    ]
    assert set(frame["status"]) == {"ok"}
    (times,) = frame[(frame["num_tokens"] == 8) & (frame["backend"] == "torch_mm")]["time_ms"]
    assert times == pytest.approx(0.675707)
    assert set(result.environments) == set(frame["env_id"])
    assert set(public.pivot(frame, "time_ms").columns) == {"loop", "torch_mm"}


def test_every_command_that_reads_results_reads_it(older, moebench):
    shutil.copytree(older, "same")
    shown = moebench("show", "out")
    assert (shown.code, shown.err) == (0, "")
    assert "0.676" in shown.out
    for command in (("report", "out"), ("plots", "out"), ("compare", "out", "same")):
        found = moebench(*command)
        assert found.code == 0, found.err
    assert "</html>" in (older / "report.html").read_text()
    gated = moebench("gate", "out", "same")
    assert (gated.code, gated.err) == (3, ""), "a copy is the same measurement"
    assert gated.out.splitlines()[-1] == "gate: 4 INCOMPARABLE"


def test_it_is_not_compared_with_results_of_now(older, moebench, tmp_path):
    """The rows of now are a copy that has their schema."""
    shutil.copytree(older, "now")
    journal = tmp_path / "now" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"schema":1', b'"schema":2'))
    why = "schema 1 -> 2: moebench measures differently since"
    gated = moebench("gate", "out", "now")
    assert (gated.code, gated.err) == (3, "")
    assert gated.out.splitlines()[-1] == "gate: 4 INCOMPARABLE"
    said = " ".join(gated.out.split())
    for measure in ("time", "memory"):
        assert f"INCOMPARABLE {measure}: {why}; measure both again: " in said
    compared = moebench("compare", "out", "now")
    assert compared.code == 0
    assert f"now against out: INCOMPARABLE: {why}, so rows of different schemas have no ratio" in compared.out


def test_its_run_is_not_resumed_where_times_are_measured_differently(older, moebench):
    found = moebench("run", "--resume", "out")
    assert (found.code, found.out) == (2, "")
    assert "its rows have schema 1, this moebench measures 2; --force resumes" in found.err


def test_its_run_is_resumed_only_where_it_was_or_by_force(older, moebench, monkeypatch, tmp_path):
    journal = older / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"schema":1', b'"schema":2'))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stand_in.write(tmp_path / "elsewhere", stand_in.ALL)
    process = stand_in.started(tmp_path / "elsewhere", "run", "--resume", "out", cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    (line,) = err.strip().splitlines()
    assert (process.returncode, out) == (2, "")
    assert "the environment has changed: " in line
    assert "python 3.11 -> 3; torch 2.13.0+cpu -> none" in line
    assert len(Journal(older / "journal.jsonl").read()[0]) == len(MEASURED)


@pytest.mark.certify(share=0)  # it measures with real workers
def test_what_was_left_of_its_run_is_measured_and_nothing_else(older, moebench, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = (older / "journal.jsonl").read_bytes()
    planned = moebench("run", "--resume", "out", "--dry-run", "--force")
    assert "3 jobs, 2 cases" in planned.out.splitlines()
    found = moebench("run", "--resume", "out", "--force")
    assert (found.code, found.err.strip()) == (0, "")
    assert (older / "journal.jsonl").read_bytes().startswith(before)
    rows, torn = Journal(older / "journal.jsonl").read()
    assert torn == 0
    assert jobs_of(rows[: len(MEASURED)]) == MEASURED
    assert sorted(jobs_of(rows[len(MEASURED) :])) == LEFT
    assert {row.status.value for row in rows} == {"ok"}
    frame = public.load(older)
    # times of two environments make no common time, so a job that was left has only its round of now
    found = zip(frame["num_tokens"], frame["backend"], frame["num_rounds"], frame["schema"], strict=True)
    assert sorted(found) == [(8, "loop", 1, 2), (8, "torch_mm", 1, 2), (16, "loop", 2, 1), (16, "torch_mm", 1, 2)]
    assert [OTHER_ENVIRONMENT in flags for flags in frame["flags"]] == (frame["num_rounds"] == 1).tolist()
    resumed = json.loads((older / "run.json").read_text())["resumed"]
    assert [line.partition(" ")[2] for line in resumed] == ["moebench run --resume out --force"]
