"""Find routing that was captured from a model, and name it by its content.

A case names a trace by the hash of its bytes, so the same sweep in another folder has the same case ids, and other
routing at the same path has other ids. The job carries the path beside the case.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from moebench.names import is_file

SUFFIXES = (".npy", ".npz", ".parquet", ".jsonl", ".json")
#: The number of hexadecimal digits of a content's hash in the text of a routing.
DIGITS = 16
_TEXT = re.compile(r"trace:(?P<named>.+?)(?:#layer=(?P<layer>[0-9]{1,9}))?", re.DOTALL)


@dataclass(frozen=True)
class Captured:
    """The routing of a trace: its text in a case, and the file or folder that has the trace.

    Two are equal if their content and layer are.
    """

    text: str
    file: str = field(compare=False)

    def __str__(self) -> str:
        return self.text


def parts_of(routing: str) -> tuple[str, int | None]:
    """Return what the text of a captured routing names, which is a path or a hash, and its layer."""
    found = _TEXT.fullmatch(routing)
    assert found is not None, routing
    return found["named"], None if found["layer"] is None else int(found["layer"])


def find_trace(routing: str, folder: Path) -> Captured | None:
    """Return the captured routing that `trace:PATH` or `trace:PATH#layer=3` names; None if there is no such path.

    PATH is a file or a folder, absolute or relative to `folder`.
    """
    named, layer = parts_of(routing)
    try:
        path = (folder / named).resolve()
        if not files_of(path):
            return None
    except (OSError, ValueError, RuntimeError):  # NUL, a name that is too long, or links in a circle
        return None
    text = f"trace:{digest(path)}" + ("" if layer is None else f"#layer={layer}")
    return Captured(text, str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def files_of(path: Path) -> list[Path]:
    """Return the files of the trace at `path`: the file itself, or the files of a folder that have a known suffix."""
    if is_file(path):
        return [path]
    return sorted(file for file in path.glob("*") if file.suffix in SUFFIXES and is_file(file))


def digest(path: Path) -> str:
    """Return the beginning of the SHA-256 of the trace's files, in the order of their names.

    The name of a single file does not count. In a folder the names count, because they may name the ranks.
    """
    files = files_of(path)
    found = hashlib.sha256()
    for file in files:
        if len(files) > 1:
            found.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                found.update(chunk)
    return found.hexdigest()[:DIGITS]
