"""Results are opened, and runs are planned, where torch and the vendor packages cannot be imported at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.case import Case, Job
from moebench.record import Journal, Status, record

ROOT = Path(__file__).parents[2]

#: Stands before every other finder: what is blocked is not there, whoever asks.
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformer_engine", "grouped_gemm", "deep_ep", "torchao", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""
WITHOUT_TORCH = (
    *("case", "spec", "axes", "selection", "sweepfile", "models", "record", "stats", "frame", "plots", "tables"),
    *("advise", "advisecli", "notebook", "footprint", "forecast", "scaling"),
    *("report", "pagetable", "reproduce", "roofline"),
    *(
        "results",
        "runplan",
        "runcli",
        "suite",
        "audit",
        "runner",
        "supervisor",
        "worklist",
        "resume",
        "slots",
        "listing",
        "doctor",
        "environment",
        "nvml",
        "versions",
        "cli",
        "ranksum",
        "verdicts",
    ),
    *("comparability", "findings", "gate", "gatecli", "gatejson", "gatetable", "github", "junit"),
    *("baseline", "comparison", "comparecli", "comparetable", "history", "merge", "noise", "simulate", "turns"),
)


def python(code, *arguments, cwd):
    command = [sys.executable, "-W", "error", "-c", BLOCKED + code, *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=100)


@pytest.fixture
def folder(tmp_path):
    """A results folder of one record."""
    case = Case(num_tokens=8, n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8)
    measured = {"time_ms": 1.5, "parity_worst": 0.25, "samples_ms": (1.5,), "sample_rounds": (0,)}
    row = record(Job(case=case, backend="gmm"), Status.ok, run_id="20261101-000000-a", env_id="e", **measured)
    Journal(tmp_path / "journal.jsonl").append(row)
    return tmp_path


def test_what_opens_results_imports_without_torch(tmp_path):
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(f'moebench.{name}')\n"
    code += "assert 'torch' not in sys.modules\n"
    done = python(code, *WITHOUT_TORCH, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


COMMAND = """
from moebench.cli import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize("command", ["show", "plots", "report", "dry-run"])
def test_results_are_opened_and_runs_planned_without_torch(folder, command):
    arguments = ["run", ROOT / "suites" / "quick.toml", "--dry-run"] if command == "dry-run" else [command, folder]
    done = python(COMMAND, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    *printed, has_torch = done.stdout.splitlines()
    assert has_torch == "False"
    assert {"show": "gmm", "plots": "wrote", "report": "wrote", "dry-run": "jobs"}[command] in "\n".join(printed)


def test_the_block_blocks(tmp_path):
    done = python("import moebench.parity", cwd=tmp_path)
    assert done.returncode != 0
    assert "torch is blocked" in done.stderr
