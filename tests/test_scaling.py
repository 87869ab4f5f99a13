"""The programs of docs/scaling.md measure the real supervisor and the real commands. Here they do it in small."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def measured(folder: Path, program: str, *arguments: str) -> list[dict[str, Any]]:
    """Run a program of suites/scaling in `folder`, and return the rows that it wrote."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "suites" / "scaling" / program), *arguments, "--out", "out.json"]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True)
    rows: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())["rows"]
    return rows


def test_the_supervisor_hands_each_job_to_a_stand_in_once(tmp_path: Path) -> None:
    """The program itself fails unless the journal has each job once."""
    (row,) = measured(tmp_path, "supervisor.py", "--workers", "3", "--servers", "1", "--jobs", "200")
    assert (row["num_workers"], row["num_jobs"]) == (3, 200)
    assert row["jobs_per_s"] > 0
    assert 0 < row["cpu_ms_per_job"] <= 1000 / row["jobs_per_s"], "the supervisor is one process with one thread"
    assert 0 <= row["wait_ms"] <= row["wait_99_ms"]


@pytest.mark.certify(share=0)
def test_each_command_is_measured(tmp_path: Path) -> None:
    rows = measured(tmp_path, "commands.py", "800")
    assert [row["command"] for row in rows] == ["show", "report", "gate", "list", "dry run"]
    assert min(row["cpu_s"] for row in rows) > 0
