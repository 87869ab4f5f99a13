"""`moebench --help` and the completion know the commands before their modules are imported."""

import importlib
import pkgutil

import pytest
import typer.main
from typer.core import TyperGroup

import moebench.cli
from moebench.cli.app import Commands, app
from tests.moebench.typed import finished


def defined() -> dict[tuple[str, str], str]:
    """Return the line in the help of each command that a module of `moebench.cli` defines, by module and name."""
    found = {}
    for module in pkgutil.iter_modules(moebench.cli.__path__, "moebench.cli."):
        commands = getattr(importlib.import_module(module.name), "commands", None)
        if commands is not None:
            made = typer.main.get_command(commands)
            group = made.commands if isinstance(made, TyperGroup) else {made.name: made}
            found |= {(module.name, name): command.get_short_help_str(200) for name, command in group.items()}
    return found


def test_the_list_of_commands_says_what_their_modules_say() -> None:
    listed = typer.main.get_command(app).commands
    by_module = {(entry.module, name): listed[name].get_short_help_str(200) for name, entry in Commands.entries.items()}
    assert by_module == defined()
    assert list(listed) == ["list", "doctor", *Commands.entries]


@pytest.mark.parametrize("arguments", [(), ("run",), ("list",), ("baseline",), ("baseline", "update")])
def test_dash_h_is_help(moebench, arguments) -> None:
    short, long = (moebench(*arguments, flag) for flag in ("-h", "--help"))
    assert (short.code, short.out, short.err) == (0, long.out, "")
    assert "Usage: moebench" in short.out


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("moebench his", "history"), ("moebench show --js", "--json"), ("moebench baseline u", "update")],
)
def test_a_shell_completes_commands_and_options(monkeypatch, tmp_path, typed, completed) -> None:
    """As the script of `moebench --show-completion bash` asks for it."""
    monkeypatch.setenv("_MOEBENCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert finished(cwd=tmp_path).out.split() == [completed]
    assert not list(tmp_path.iterdir())
