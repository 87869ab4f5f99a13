"""Import the module of a command only when the command is used.

`moebench --help`, a misspelt command and the completion of a command's name need only the commands' names and first
lines. The modules of all commands together import pandas, matplotlib and scipy, which takes seconds.
"""

import importlib
from typing import Any, ClassVar, NamedTuple

import typer.main
from typer.core import TyperCommand, TyperGroup


class Entry(NamedTuple):
    """A command that is not imported yet: the module that defines it, and the line about it in `moebench --help`."""

    module: str
    help: str

    def load(self, name: str) -> Any:
        """Import the module, and return its command of that name."""
        commands = typer.main.get_command(importlib.import_module(self.module).commands)
        return commands.commands[name] if isinstance(commands, TyperGroup) else commands


class LazyGroup(TyperGroup):
    """A group of commands. A subclass lists those in `entries` that are imported when they are used."""

    entries: ClassVar[dict[str, Entry]]

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        for name, entry in self.entries.items():
            self.add_command(TyperCommand(name, callback=None, help=entry.help))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the command that the arguments name, after the import of its module."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in self.entries:
            command = self.entries[name].load(name)
        return name, command, rest
