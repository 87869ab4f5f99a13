"""One process at a time writes into a results folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moebench.errors import UsageError
from moebench.results.files import check_empty, writable

LOCK_NAME = Path("logs") / "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While the block runs, no other process writes results into the folder. Raises UsageError where one does, and
    where this one cannot.

    The lock goes with its process, however that ends.
    """
    path = folder / LOCK_NAME
    with writable(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{folder}: process {file.read().strip() or 'of another machine'} is writing into it; "
                "wait until it has ended, or name another folder"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def check_new(folder: Path) -> None:
    """Raises UsageError for a folder that holds anything but the lock of the process that will write into it."""
    check_empty(folder, besides=(folder / LOCK_NAME, folder / LOCK_NAME.parent))
