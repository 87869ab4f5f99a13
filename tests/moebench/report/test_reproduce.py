"""The command for a row names the sweep of the run's own file."""

import json
from pathlib import Path

import pytest

from moebench.report.reproduce import Reproducer
from moebench.results.frame import load
from moebench.run.runfile import sweeps_of
from moebench.workload.spec import find_sweep, load_sweep

PUBLISHED = Path(__file__).parents[3] / "results" / "published"
SWEEPS = (
    *("fp8", "fp8-ep2", "gpu", "gpu-ep2", "gpu-ep4", "lora", "peers", "peers-ep2", "quick", "training", "training-ep2"),
)
RUN_FILES = sorted(PUBLISHED.rglob("run.json"))


def row() -> dict:
    job = load_sweep(find_sweep("quick")).jobs()[0]
    return {"case_id": job.case.case_id, "backend": "loop", "dispatcher": "local", "device": "cpu"}


def run_json(**changes: object) -> str:
    fields = json.loads((PUBLISHED / "h200-peers-2026-11-23" / "run.json").read_text())
    return json.dumps({**fields, "command": "moebench run no-such-sweep", **changes})


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: str(path.parent.relative_to(PUBLISHED)))
def test_run_files_of_old_folders_are_read_and_reproduce_what_they_can(path: Path) -> None:
    reproducer = Reproducer.of(path.parent)
    beside = path.with_name("sweep.toml")
    if "merged" in json.loads(path.read_text()):
        assert set(reproducer.case_ids) == ({str(beside)} if beside.is_file() else set())
    else:
        assert sweeps_of(path.parent)[-1] in SWEEPS
    if reproducer.case_ids:
        rows = load(path.parent).to_dict("records")
        assert None not in [reproducer.command(row) for row in rows]


def test_the_sweep_of_the_run_is_found_where_it_was_else_by_its_name(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_bytes(find_sweep("quick").read_bytes())
    (tmp_path / "run.json").write_text(run_json(sweep="quick", sweep_file=str(own)))
    words = f"--case {row()['case_id']} --only loop --device cpu"
    assert Reproducer.of(tmp_path).command(row()) == f"moebench run {own} {words}"
    own.unlink()
    assert Reproducer.of(tmp_path).command(row()) == f"moebench run quick {words}"


@pytest.mark.parametrize("content", [None, "{", "[]", '{"merged": []}'])
def test_a_folder_without_a_run_has_what_its_sweep_says(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert Reproducer.of(tmp_path).command(row()) is None
    sweep = tmp_path / "sweep.toml"
    sweep.write_bytes(find_sweep("quick").read_bytes())
    assert Reproducer.of(tmp_path).command(row()).startswith(f"moebench run {sweep} --case ")
