"""Define which texts may name a file or a folder. A name that a file gives is checked before it becomes a path."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints

#: A letter or digit first, so that a name is never `..`, never an option and never a hidden file. No slash, no NUL.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
NAME_RULE = 'must be letters, digits, ".", "_" and "-", a letter or digit first, at most 160 characters'
#: File systems allow 255 bytes. A file's name may have further parts beside the checked name.
MOST_CHARACTERS = 160

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=MOST_CHARACTERS)]
#: One name, or the names of several rounds as a merged row has them: `20261123-104124-quick | 20261124-091500-quick`.
Names = Annotated[str, StringConstraints(pattern=rf"{NAME_PATTERN[:-1]}( \| {NAME_PATTERN[1:-1]})*$")]


def as_name(text: str, most: int = 80) -> str:
    """Return a name that resembles `text`: lower case, with `-` for each run of other characters."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:most].strip("-")


def is_file(path: Path) -> bool:
    """Whether there is a file at `path`; false for a path that no file can have, for example one that is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
