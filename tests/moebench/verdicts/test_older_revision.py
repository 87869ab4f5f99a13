"""`moebench ab` compares a revision of `experts` that has no catalog yet with the current revision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.cli import app
from moebench.results.frame import load
from moebench.verdicts import ab
from moebench.verdicts.revisions import copy_experts, unknown_backends
from tests.moebench.workload.test_driven import renamed_experts

ROOT = Path(__file__).parents[3]
#: The last revision whose `experts` has no catalog.
OLDER = "6503759"


@pytest.fixture
def older() -> str:
    command = ["git", "cat-file", "-e", f"{OLDER}^{{commit}}"]
    if subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip(f"git has no revision {OLDER} here: the clone is shallow, or there is no repository")
    return OLDER


def test_the_worker_runs_with_the_experts_of_an_older_revision(older, tmp_path, monkeypatch):
    """`ab` asks a process that imports the worker which backends the revision lacks."""
    monkeypatch.chdir(ROOT)
    revision = copy_experts(older, tmp_path / "experts")
    assert list(unknown_backends(revision, ["loop", "triton", "no_such"])) == ["no_such"]


@pytest.mark.certify(share=0)  # four processes take most of a minute
@pytest.mark.timeout(300)
@pytest.mark.parametrize("other", ["older", "renamed"])
def test_another_revision_is_measured_beside_this_one(other, request, capsys, monkeypatch, tmp_path):
    """`ab` with one job and one round ends with a verdict, and the results of both revisions are right.

    The other revision is an older one, or this one with other names for all modules of `experts`.
    """
    is_older = other == "older"
    revision = request.getfixturevalue("older") if is_older else str(renamed_experts(tmp_path / "renamed"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ab, "schedule", lambda num_jobs: (1,))
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    filters = ["--filter", "num_tokens=16", "--filter", "mode=forward", "--filter", "backend=torch_mm"]
    command = [
        "moebench",
        "ab",
        revision,
        "HEAD" if is_older else ".",
        "quick",
        "--device",
        "cpu",
        "--out",
        str(out),
        *filters,
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):  # the exit code depends on the speeds in one round
        app.main()
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("gate: 1 "), printed.err
    for side in "ab":
        rows = load(out / side)
        assert set(rows["status"]) == {"ok"}, rows["detail"].tolist()
