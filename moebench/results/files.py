"""Write each file whole or not at all, and turn a full disk or an unwritable place into a message of one line."""

import errno
import os
import shlex
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from moebench.errors import RunnerError, UsageError

#: The files of a results folder that hold its rows and its environment.
PARQUET_NAME = "results.parquet"
ENVIRONMENT_NAME = "environment.json"
#: The folder with one file per environment. Only results from several environments have it.
ENVIRONMENTS_NAME = "environments"

#: Error numbers that stop any writing: the disk or a quota is full, the file reached a size limit, the file system is
#: read-only, or the disk fails.
CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the content of the file `path` in one step. A crash leaves either the old file or the new one.

    If `path` is a symbolic link, the link stays, and the file that it points to gets the content. A pipe or a device
    stays too, and gets the content as it comes.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as place:  # raises for a folder
            place.write(content)
        return
    scratch = path.with_name(f".moebench.{os.getpid()}.tmp")  # short, so that the longest name of a file still fits
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def content_of(path: Path) -> bytes | None:
    """Return the content of a file. Return None if there is no file that can be read, such as a pipe in its place.

    It never waits: another process may put a pipe in the file's place at any moment.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError:  # a folder too
        return None


def write_again(path: Path, content: bytes) -> None:
    """Write a file that another process has changed, removed or replaced by a link or a pipe.

    Raises RunnerError if this is not possible.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.unlink()  # never write through it: the other process chose where it leads
        write_atomically(path, content)
    except OSError as error:
        raise RunnerError(
            f"{path}: another process changed or removed it during the run, and it cannot be written again: "
            f"{error.strerror}; measure again, and name a folder with --out that only moebench writes into"
        ) from error


@contextmanager
def writable(place: Path) -> Iterator[None]:
    """Turn every OSError of the block into a UsageError that names `place`."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{place}: cannot be written: {error.strerror or error}; name another place") from error


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an OSError with a number in `CANNOT_WRITE` into a RunnerError that says how to continue the run."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise RunnerError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; all finished jobs are in the results "
            f"folder; make room and continue with `moebench run --resume {shlex.quote(str(folder))}`"
        ) from error


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[None]:
    """Make the folder. If the block fails and the folder was absent or empty before, leave it so."""
    was_there = folder.exists()
    was_empty = not (was_there and any(folder.iterdir()))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if was_empty:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not was_there:
            folder.rmdir()
        raise


def check_empty(folder: Path, besides: Collection[Path] = ()) -> None:
    """Raise UsageError if `folder` is a file, or a folder with anything in it except the paths in `besides`."""
    if folder.exists() and (not folder.is_dir() or any(path not in besides for path in folder.rglob("*"))):
        raise UsageError(f"--out {folder}: it exists and is not an empty folder; name a new or empty folder")
