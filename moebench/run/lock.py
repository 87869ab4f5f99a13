"""Lock a results folder, so that only one process at a time writes into it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moebench.errors import UsageError
from moebench.results.files import check_empty, writable

LOCK_NAME = Path("logs") / "lock"
#: Error numbers of a file system without locks, for example a network file system whose lock server does not run.
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP})
#: The file with the id of the process that writes. The lock file cannot hold the id, because some releases of filelock
#: empty the lock file.
PID_NAME = LOCK_NAME.with_suffix(".pid")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing results into the folder while the block runs.

    Raises UsageError where another process holds the lock, and where this process cannot write into the folder. The
    lock ends with its process, however the process ends.
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
        except (OSError, NotImplementedError) as error:  # some releases of filelock raise the second for ENOSYS
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            raise UsageError(
                f"{folder}: its file system cannot lock files, and without a lock two runs could write into one "
                "folder; name a folder on another file system with --out"
            ) from error
    try:
        (folder / PID_NAME).write_text(f"{os.getpid()}\n")  # the caller reports a full disk, with how to go on
        yield
    finally:
        lock.release()


def _writer(folder: Path) -> str:
    """Return the id of the process that writes, or "of another machine" where no id can be read."""
    try:
        pid = (folder / PID_NAME).read_text().strip()
    except OSError:
        pid = ""
    return pid or "of another machine"


def check_new(folder: Path) -> None:
    """Raise UsageError where the folder holds anything except the lock of the process that will write into it."""
    check_empty(folder, besides=(folder / LOCK_NAME, folder / PID_NAME, folder / LOCK_NAME.parent))
