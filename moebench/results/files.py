"""Writing files: whole or not at all, and one line where a place or a disk cannot take them."""

import errno
import os
import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from moebench.errors import RunnerError, UsageError

#: What the system says where a file cannot grow: the disk or a quota is full, a limit is met, the disk fails.
CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: a crash leaves the old file or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def writable(place: Path) -> Iterator[None]:
    """Turn every OSError of the block into a UsageError that names `place`."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{place}: cannot be written: {error.strerror}; name a place that can be") from error


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a full disk into a RunnerError that says how to go on with the run."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise RunnerError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; what was measured is in the results "
            f"folder; make room and continue with `moebench run --resume {shlex.quote(str(folder))}`"
        ) from error


def check_empty(folder: Path, besides: Collection[Path] = ()) -> None:
    """Raises UsageError for a file, and for a folder that holds anything but the paths `besides`."""
    if folder.exists() and (not folder.is_dir() or set(folder.rglob("*")) - set(besides)):
        raise UsageError(f"--out {folder}: it exists and is not an empty folder; name a new one")
