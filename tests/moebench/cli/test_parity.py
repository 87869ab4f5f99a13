"""`moebench parity` as a user types it, over backends that are right, wrong and broken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moebench.cli import parity
from moebench.parity.checks import CHECKS
from moebench.parity.space.rules import limits
from moebench.parity.space.trial import Trial
from moebench.results.record import Status
from tests.moebench.audited import audit_of, audited
from tests.moebench.typed import is_refused

ROOT = Path(__file__).parents[3]
MASKED = "steps=call:no_grad num_tokens=2 mask=some seed=1"


def moebench_parity(*arguments, cwd):
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests" / "backends"), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "60"}
    command = [sys.executable, "-m", "moebench", "parity", "--device", "cpu", *arguments]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=110)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def test_a_right_backend_passes_in_a_worker_process(tmp_path):
    found = moebench_parity("loop", "--case", MASKED, "--json", cwd=tmp_path)
    told = json.loads(found.out)
    assert (found.code, found.err, told["passed"]) == (0, "", True)
    assert [(one["backend"], one["status"], one["num_cases"]) for one in told["backends"]] == [("loop", "ok", 1)]
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_backend_gets_lines_that_can_be_copied_and_run(tmp_path):
    found = moebench_parity("faulty:LeakingMask", "--case", MASKED, cwd=tmp_path)
    assert (found.code, found.err) == (1, "")
    _, told = found.out.split("\nfaulty:LeakingMask: ")
    _, command, *lines = told.splitlines()
    assert command.startswith("  moebench parity faulty:LeakingMask --case 'steps=call:no_grad ")
    assert command.endswith("'")
    Trial.parse(command.partition("--case '")[2].rstrip("'"))
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "backends")))}
    code = "\n".join(line.removeprefix("  ") for line in lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert "AssertionError" in done.stderr


def test_a_mistyped_backend_is_one_line(tmp_path):
    found = moebench_parity("lop", "--case", MASKED, cwd=tmp_path)
    assert (found.code, found.out) == (2, "")
    assert "did you mean 'loop'?" in found.err


def test_a_backend_that_is_not_there_is_one_line_and_no_other(moebench):
    found = moebench("parity", "nosuchmodule:X", "--device", "cpu")
    assert (found.code, found.out) == (2, "")
    (line,) = found.err.splitlines()
    assert "nosuchmodule" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "num_token=3"], 'did you mean "num_tokens"?'),
        (["--case", "num_tokens=many"], "num_tokens = many must be an integer"),
        (["--case", "mask=sum"], "mask = sum must be one of all-kept, some"),
        (["--case", "steps=cal"], 'did you mean "call"?'),
        (["--case", "n_activated_experts=3"], "a token cannot choose more experts than there are"),
        (["--case", "seed=1", "--dispatcher", "alltoall"], "--dispatcher alltoall with ep_size = 1"),
        (["--case", "seed=1", "--check", "modes"], "leave them out with --case"),
        (["--case", "seed=1", "--seconds", "3"], "leave them out with --case"),
        (["--dispatcher", "alltoall"], "--dispatcher alltoall without --case"),
        (["--check", "mode"], 'did you mean "modes"?'),
        (["--dtype", "float8"], "--dtype float8"),
    ],
)
def test_a_wrong_request_is_one_line(moebench, arguments, words):
    is_refused(moebench("parity", "loop", "--device", "cpu", *arguments), words)


def test_a_case_is_of_one_backend(moebench):
    is_refused(moebench("parity", "--case", "seed=1"), "--case needs one BACKEND, and 0 are named")
    is_refused(moebench("parity", "loop", "gmm", "--case", "seed=1"), "and 2 are named")


def test_the_options_reach_the_audit_and_an_interruption_has_its_exit_code(moebench, monkeypatch):
    asked = []

    def audit(backends, request, **options):
        asked.append((backends, request, options["required"]))
        return audit_of(audited("loop", Status.ok), interrupted=True)

    monkeypatch.setattr(parity, "audit", audit)
    chosen = ["--level", "quick", "--seconds", "2.5", "--check", "modes", "--dtype", "float32", "--seed", "7"]
    found = moebench("parity", "loop", "--device", "cpu", *chosen)
    assert (found.code, "Traceback" in found.err) == (130, False)
    assert asked == [(["loop"], parity.Request("quick", 2.5, ("modes",), ("float32",), "cpu", 7), ["loop"])]


def test_the_checks_of_parity_can_be_listed(moebench):
    listed = json.loads(moebench("parity", "--list", "--json").out)
    assert listed == {check.name: check.looks_for for check in CHECKS.values()}
    told = moebench("parity", "--list").out
    assert all(f"\n{name} " in told for name in listed)
    assert all(f"* {limit}" in told for limit in limits())
