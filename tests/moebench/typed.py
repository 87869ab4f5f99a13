"""Run the command line as a user types it: in its own process, on a tiny sweep, with the tests' backends importable."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.moebench.executed import python_path

ROOT = Path(__file__).parents[2]

SWEEP = """
name = "tiny"
description = "two cases"

[policy]
time_cap_s = 0.01
interval_target = 0.9

[[grid]]
n_routed_experts = 4
n_activated_experts = 2
dim = 16
moe_inter_dim = 8
num_tokens = [8, 24]
dtype = "float32"
backend = ["loop", "torch_mm"]
"""


def started(*arguments, cwd):
    """Run the command line in its own process, with the backends of tests/backends importable."""
    path = python_path(ROOT, ROOT / "tests" / "backends")
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "moebench", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=variables, stdout=pipe, stderr=pipe, text=True)


def finished(*arguments, cwd):
    process = started(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=100)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def is_refused(found, *words):
    """The command prints one line that says what is wrong, exits with code 2, and does nothing."""
    assert found.code == 2, found
    assert found.out == ""
    (line,) = found.err.strip().splitlines()
    for word in words:
        assert word in line
    assert not Path("results").exists()
