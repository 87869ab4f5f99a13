"""What all commands share (devices, wrong flags, help), and `list` and `doctor` as a user types them."""

import json
import re
from pathlib import Path

import pytest

from moebench import __version__
from moebench.workload.spec import load_sweep
from tests.moebench.typed import is_refused

ROOT = Path(__file__).parents[3]
#: The commands import Transformer Engine to find out whether it can run.
#: If JAX is installed, Transformer Engine warns that it was built without JAX.
VENDORS_MAY_WARN = pytest.mark.filterwarnings("ignore:Detected a Jax installation:RuntimeWarning")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "cpu:0", "meta", ""])
@pytest.mark.parametrize("command", ["run", "list"])
def test_a_device_that_cannot_be(sweep, moebench, command, device):
    arguments = [sweep] if command == "run" else []
    is_refused(
        moebench(command, *arguments, "--device", device), f"--device {device}", "it must be cpu, cuda or cuda:N"
    )


@pytest.mark.parametrize("command", [("show",), ("gate", "a"), ("report",), ("run",)])
def test_a_name_with_a_newline_is_refused_in_one_line(moebench, command):
    is_refused(moebench(*command, "no\nsuch"), r"no\nsuch")


def test_options_that_would_change_nothing(sweep, moebench):
    is_refused(moebench("list", sweep, "--device", "cuda"), "--device cuda with SWEEP")
    is_refused(moebench("list", "--filter", "num_tokens=8"), "give a SWEEP")
    is_refused(moebench("list", "--backend", "loop"), "give a SWEEP")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("run", "quick", "--bogus"),
        ("run", "quick", "--time-budget", "-1"),
        ("run", "quick", "--time-budget", "soon"),
        ("run", "quick", "also"),
        ("rum",),
        ("--bogus",),
        ("show",),
    ],
)
def test_wrong_flags(moebench, arguments):
    found = moebench(*arguments)
    assert found.code == 2
    assert "Traceback" not in found.err
    assert found.err != ""
    assert not Path("results").exists()


@VENDORS_MAY_WARN
def test_list_names_sweeps_and_backends(moebench):
    found = moebench("list", "--device", "cpu")
    assert found.code == 0
    for word in ("quick", "gpu", "loop", "torch_mm", "available"):
        assert word in found.out
    listed = json.loads(moebench("list", "--json", "--device", "cpu").out)
    assert {"loop", "torch_mm"} <= {line["name"] for line in listed["backends"] if line["unavailable"] is None}
    quick = load_sweep(ROOT / "suites" / "quick.toml")
    (line,) = [line for line in listed["sweeps"] if line["name"] == "quick"]
    assert line == {"name": "quick", "num_jobs": len(quick.jobs()), "description": quick.description}


@VENDORS_MAY_WARN
def test_doctor_says_what_is_there(moebench):
    found = moebench("doctor")
    assert found.code == 0
    assert re.search(r"^ok +torch", found.out, re.MULTILINE)
    assert "loop" in found.out
    findings = json.loads(moebench("doctor", "--json").out)
    assert {finding["level"] for finding in findings} <= {"ok", "missing", "problem"}
    assert "torch" in {finding["name"] for finding in findings}


def test_version_and_help(moebench):
    assert moebench("--version").out == f"moebench {__version__}\n"
    assert "Usage" in moebench("--help").out
    for command in ("run", "list", "doctor", "show", "plots"):
        assert command in moebench("--help").out
        assert moebench(command, "--help").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shwo",), "No such command 'shwo'. Did you mean 'show'? See `moebench --help`."),
        (("gate", "a"), "Missing argument 'candidate'. See `moebench gate --help`."),
        (("run", "quick", "--nosuch\x1b[31m"), r"No such option: --nosuch\x1b[31m. See `moebench run --help`."),
    ],
)
def test_a_wrong_command_line_is_one_line(moebench, arguments, message):
    found = moebench(*arguments)
    assert (found.code, found.out) == (2, "")
    assert found.err.strip() == message
