"""The GitHub Action of the gate: what it runs for which inputs, and that the workflows of docs/ci have such inputs."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from moebench import __version__
from moebench.cli.app import app

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "actions" / "gate"
ACTION = yaml.safe_load((FOLDER / "action.yml").read_text())
WORKFLOWS = sorted((ROOT / "docs" / "ci").glob("*.yml"))
#: A program `moebench` that writes down how it was called, and ends with the code that the test names for its command.
RECORDER = """#!/bin/bash
printf '%s\\n' "$@" "" >> "$CALLS"
name=CODE_$1
exit "${!name:-0}"
"""


def defaults() -> dict[str, str]:
    return {name: some["default"] for name, some in ACTION["inputs"].items()} | {"base": "abc123"}


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """Return a function that runs the step `Gate` with inputs and codes, and returns its code and the calls it made."""
    program = tmp_path / "bin" / "moebench"
    program.parent.mkdir()
    program.write_text(RECORDER)
    program.chmod(0o755)

    def run(inputs: dict[str, str], **codes: int) -> tuple[int, list[list[str]]]:
        (step,) = (step for step in ACTION["runs"]["steps"] if step["name"] == "Gate")
        given = defaults() | inputs
        variables = {
            name: given[re.fullmatch(r"\$\{\{ inputs\.(\w+) }}", text)[1]] for name, text in step["env"].items()
        }
        places = {"RUNNER_TEMP": str(tmp_path), "GITHUB_ACTION_PATH": str(FOLDER), "CALLS": str(tmp_path / "calls")}
        failures = {f"CODE_{name}": str(code) for name, code in codes.items()}
        path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, **variables, **places, **failures}
        done = subprocess.run(
            ["bash", "-c", step["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
        return done.returncode, [call.splitlines() for call in calls.split("\n\n") if call]

    return run


def test_two_revisions_are_measured_in_turn(gate) -> None:
    code, calls = gate({"arguments": "--filter=num_tokens>=64\n\n--time-budget=60\n"})
    judge = ["--threshold", "3%", "--github", "--junit", "gate.xml"]
    more = ["--filter=num_tokens>=64", "--time-budget=60"]
    assert (code, calls) == (0, [["ab", "abc123", "HEAD", "quick", "--out", "results/runs/gate", *judge, *more]])


def test_a_run_is_judged_by_the_baseline(gate) -> None:
    code, calls = gate({"against": "baseline", "sweep": "gpu", "arguments": "--rounds=20", "junit": "a b.xml"})
    judged = ["gate", "auto", "results/runs/gate", "--threshold", "3%", "--github", "--junit", "a b.xml"]
    assert (code, calls) == (0, [["run", "gpu", "--out", "results/runs/gate", "--rounds=20"], judged])


def test_a_run_that_fails_is_not_judged(gate) -> None:
    code, calls = gate({"against": "baseline"}, run=1)
    assert code == 1
    assert [call[0] for call in calls] == ["run"]


@pytest.mark.parametrize("against", ["revision", "baseline"])
def test_the_step_fails_as_the_verdict_says(gate, against: str) -> None:
    command = {"revision": "ab", "baseline": "gate"}[against]
    for verdict, code in {0: 0, 1: 1, 2: 2, 3: 0}.items():
        assert gate({"against": against}, **{command: verdict})[0] == code
    assert gate({"against": against, "undecided": "fail"}, **{command: 3})[0] == 3


@pytest.mark.parametrize("wrong", [{"against": "base"}, {"undecided": "warn"}])
def test_a_wrong_input_is_refused_before_anything_is_measured(gate, wrong: dict[str, str]) -> None:
    assert gate(wrong) == (2, [])


def test_no_step_pastes_an_input_into_its_script() -> None:
    """What a pull request may choose, such as a branch's name, would otherwise run as a command."""
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step["run"]
        assert step["shell"] == "bash"
    used = {text for step in ACTION["runs"]["steps"] for text in step["env"].values()}
    assert used == {f"${{{{ inputs.{name} }}}}" for name in ACTION["inputs"]}


def test_the_action_calls_commands_that_exist_with_their_options() -> None:
    script = (FOLDER / "gate.sh").read_text()
    found = re.findall(r"moebench (\w+) ([^\n&]*)", script)
    assert {name for name, _ in found} == {"ab", "run", "gate"}
    shared = re.search(r"judge=\((.*)\)", script)[1]
    for name, arguments in found:
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        judged = shared if "judge" in arguments else ""
        for option in re.findall(r"--[\w-]+", arguments + judged):
            assert re.search(rf"{option}\b", shown), f"moebench {name} has no option {option}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_of_the_docs_uses_the_action_with_its_inputs(path: Path) -> None:
    (step,) = (
        step
        for job in yaml.safe_load(path.read_text())["jobs"].values()
        for step in job["steps"]
        if "gate" in step.get("uses", "")
    )
    assert step["uses"] == f"OWNER/REPO/{FOLDER.relative_to(ROOT)}@v{__version__}"
    assert step["with"].keys() <= ACTION["inputs"].keys()
    command = "ab" if step["with"].get("against", "revision") == "revision" else "run"
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for line in step["with"]["arguments"].splitlines():
        assert re.search(rf"{line.partition('=')[0]}\b", shown), line


def test_the_action_pins_the_version_that_the_documents_name() -> None:
    named = re.findall(
        r"actions/gate@v([\d.]+\d)", "".join(path.read_text() for path in [FOLDER / "action.yml", *WORKFLOWS])
    )
    assert len(named) == 3
    assert set(named) == {__version__}
