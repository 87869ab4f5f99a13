"""`moebench parity` as a user types it, over backends that are right, wrong and broken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from moebench.parity.checks import CHECKS

ROOT = Path(__file__).parents[3]


def moebench_parity(*arguments, cwd):
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests" / "backends"), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "moebench", "parity", "--device", "cpu", *arguments]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=110)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def test_right_and_wrong_backends_in_worker_processes(tmp_path):
    chosen = ["--check", "masked-tokens", "--check", "one-hot", "--dtype", "float32"]
    found = moebench_parity("loop", "faulty:LeakingMask", *chosen, "--json", cwd=tmp_path)
    told = json.loads(found.out)
    statuses = {(cell["backend"], cell["check"]): cell["status"] for cell in told["checks"]}
    assert found.code == 1
    assert statuses["loop", "masked-tokens"] == statuses["loop", "one-hot"] == "ok"
    assert statuses["faulty:LeakingMask", "masked-tokens"] == "mismatch"
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_backend_is_one_line(tmp_path):
    found = moebench_parity("lop", "--check", "one-hot", cwd=tmp_path)
    assert (found.code, found.out) == (2, "")
    assert "did you mean 'loop'?" in found.err


def test_the_list_names_every_check(tmp_path):
    found = moebench_parity("--list", cwd=tmp_path)
    assert found.code == 0
    assert all(f"\n{name} " in found.out for name in CHECKS)


def test_the_checks_of_parity_can_be_listed(moebench):
    listed = json.loads(moebench("parity", "--list", "--json").out)
    assert listed["one-hot"] == CHECKS["one-hot"].looks_for
    assert all(name in moebench("parity", "--list").out for name in listed)
