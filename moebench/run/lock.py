"""One process at a time writes into a results folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moebench.errors import UsageError
from moebench.results.files import check_empty, writable

LOCK_NAME = Path("logs") / "lock"
#: The number of the process that writes. It has a file of its own, because some releases of filelock empty the lock.
PID_NAME = LOCK_NAME.with_suffix(".pid")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While the block runs, no other process writes results into the folder. Raises UsageError where one does, and
    where this one cannot.

    The lock goes with its process, however that ends.
    """
    lock = FileLock(folder / LOCK_NAME)
    with writable(folder):
        (folder / LOCK_NAME).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:  # an OSError, which would become "cannot be written"
            raise UsageError(
                f"{folder}: process {_writer(folder)} is writing into it; "
                "wait until it has ended, or name another folder"
            ) from None
    try:
        with writable(folder):
            (folder / PID_NAME).write_text(f"{os.getpid()}\n")
        yield
    finally:
        lock.release()


def _writer(folder: Path) -> str:
    """The process that writes, as far as this machine can see."""
    try:
        pid = (folder / PID_NAME).read_text().strip()
    except OSError:
        pid = ""
    return pid or "of another machine"


def check_new(folder: Path) -> None:
    """Raises UsageError for a folder that holds anything but the lock of the process that will write into it."""
    check_empty(folder, besides=(folder / LOCK_NAME, folder / PID_NAME, folder / LOCK_NAME.parent))
