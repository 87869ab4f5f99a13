"""Whatever a file holds, a command ends with a documented exit code and one line, and writes only where it may."""

import contextlib
import itertools
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.moebench.fuzzed import COMMANDS, DRAWS, call, call_afresh, exit_codes, files_in, make, mistakes, spoil

#: How many spoiled files `make test` and `make certify` try, and how many of them in a process of its own.
PART, WHOLE = (40, 1), (2000, 100)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def commands(certify: bool) -> list[str]:
    """The commands to draw from. Commands that draw plots take most of the time, so `make test` draws them less."""
    quick = [command for command in COMMANDS if not any(word in command for word in DRAWS)]
    return list(COMMANDS) if certify else [*quick * 6, *COMMANDS]


@pytest.mark.certify
@pytest.mark.parametrize("command", COMMANDS)
def test_before_a_file_is_spoiled_every_command_works(
    origin: Path, tmp_path: Path, command: str, certify: bool
) -> None:
    """Otherwise the test below would see nothing but refusals."""
    if command.startswith("report") and not certify:
        pytest.skip("drawing takes seconds, and `plots` draws the same")
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    before = files_in(tmp_path)
    with contextlib.chdir(tmp_path):
        ended = call(command.split())
    changed = {name for name, facts in files_in(tmp_path).items() if before.get(name) != facts}
    assert [*mistakes(command, ended, changed)] == []
    assert ended.out or changed, ended
    assert bool(changed) == bool(COMMANDS[command][1])


def test_the_documents_name_the_exit_codes_of_these_commands() -> None:
    assert {command.split()[0] for command in COMMANDS} <= exit_codes().keys()


@pytest.mark.certify
@pytest.mark.timeout(1800)
def test_a_spoiled_file_is_one_line(origin: Path, commands: list[str], tmp_path: Path, certify: bool) -> None:
    num_examples, num_afresh = WHOLE if certify else PART
    numbers = itertools.count()

    @settings(
        max_examples=num_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        number = next(numbers)
        command = data.draw(st.sampled_from(commands), "command")
        kind = data.draw(st.sampled_from(COMMANDS[command][0]), "kind")
        outer = tmp_path / str(number)
        folder = outer / "in" / "here"  # a name such as ../../x leads to a place that is looked at
        shutil.copytree(origin, folder)
        spoil(data.draw, kind, folder)
        before = files_in(outer)
        afresh = number % (num_examples // num_afresh) == 0
        with contextlib.chdir(folder):
            ended = (call_afresh if afresh else call)(command.split())
        changed = {
            os.path.relpath(outer / name, folder)
            for name, facts in files_in(outer).items()
            if before.get(name) != facts
        }
        found = [*mistakes(command, ended, changed)]
        assert not found, f"{number}: {command}, spoiled {kind}: {found}\n{ended.err[:2000]}"
        shutil.rmtree(outer)

    one()
    assert next(numbers) >= num_examples
