"""Copy another revision's `experts` into a folder from which workers can import it."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moebench.errors import RevisionError
from moebench.machine.git import run_git
from moebench.run.plan import importing_from

PACKAGE = "experts"


@dataclass(frozen=True)
class Revision:
    """A copy of the package `experts` to measure. `folder` contains the copy."""

    asked: str  # the revision or the folder that the user named
    commit: str | None  # None for a copy of a folder
    folder: Path

    def __str__(self) -> str:
        return self.asked if self.commit is None else f"{self.asked} ({self.commit[:10]})"


def copy_experts(asked: str, into: Path) -> Revision:
    """Copy the package `experts` into the new folder `into`.

    `asked` is a folder that contains a package `experts`, or else a git revision of the repository that contains the
    current folder. The working tree does not change, and later changes of the working tree do not change the copy.
    Raises RevisionError if `asked` is neither such a folder nor such a revision.
    """
    source = Path(asked)
    into.mkdir(parents=True)
    if (source / PACKAGE / "__init__.py").is_file():
        shutil.copytree(source / PACKAGE, into / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        return Revision(asked, None, into)
    _git(
        asked, "rev-list", "--max-count=1", "--end-of-options", asked, "--"
    )  # gives the clearest error message, but also accepts ranges of revisions
    commit = _git(asked, "rev-parse", "--verify", "--end-of-options", f"{asked}^{{commit}}").decode().strip()
    top = _git(asked, "rev-parse", "--show-toplevel").decode().rstrip("\n")
    archive = _git(asked, "-C", top, "archive", "--format=tar", commit, PACKAGE)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(into, filter="data")
    return Revision(asked, commit, into)


def _git(asked: str, *arguments: str) -> bytes:
    try:
        done = run_git(*arguments)
    except OSError as error:
        raise RevisionError(f"{asked}: not a folder that holds an {PACKAGE}, and git does not run: {error}") from None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RevisionError(
            f"{asked}: neither a folder that holds an {PACKAGE} nor a git revision with one; git says: {reason[0]}"
        )
    return done.stdout


#: A program that imports the modules of a worker. It prints a JSON object with an error message for each backend's
#: name, or null for a backend that exists.
_PROBE = """
import json, sys
import moebench.measure.worker
from experts import RegistryError
from moebench.workload.driven import check_name

def wrong(name):
    try:
        check_name(name)
    except RegistryError as error:
        return str(error)

print(json.dumps({name: wrong(name) for name in sys.argv[1:]}))
"""


def unknown_backends(revision: Revision, names: Iterable[str]) -> dict[str, str]:
    """Return the backends among `names` that this revision does not have, with the revision's error message for each.

    Raises RevisionError if this moebench cannot import and use the revision's `experts`.
    """
    command = [sys.executable, "-c", _PROBE, *dict.fromkeys(names)]
    variables = os.environ | importing_from(revision.folder)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RevisionError(f"{revision}: this moebench cannot drive its {PACKAGE}: {reason[0]}")
    said: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return {name: wrong for name, wrong in said.items() if wrong is not None}
