"""What is measured in processes of its own, and what may go wrong before or while it is. No torch here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import moebench
from moebench.case import Job
from moebench.slots import ANYWHERE, Slot
from moebench.spec import Policy


class RunnerError(Exception):
    """A run that cannot go on: what happened, and where to look."""


class Refused(RunnerError):
    """A run that cannot begin by the user's mistake: a backend or a device that is not there, one line each."""


class UsageError(Exception):
    """Something asked for that cannot be: what, which value, the rule, the remedy, in one line."""


@contextmanager
def writable(place: Path) -> Iterator[None]:
    """What cannot be written while the block runs is a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{place}: cannot be written: {error.strerror}; name a place that can be") from error


@dataclass(frozen=True)
class Plan:
    """What is measured in fresh processes, in which order, on which slots, and where its results go.

    Of several rounds each is a plan. Where `experts_folder` is given, a folder that holds a package `experts`, workers
    import that one: this harness then drives another revision's backends. With `profile` each job leaves a trace.
    """

    jobs: tuple[Job, ...]
    policy: Policy
    folder: Path
    run_id: str
    device: str | None = None
    round: int = 0
    experts_folder: Path | None = None
    slots: tuple[Slot, ...] = ANYWHERE
    profile: bool = False


def new_run_id(sweep: str) -> str:
    """A name for a run's folder: when it began, and of which sweep."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{sweep}"


def importing_from(experts_folder: Path) -> dict[str, str]:
    """Environment variables by which Python takes `experts` from that folder, and this moebench."""
    harness = Path(moebench.__file__).resolve().parent.parent
    paths = [*map(str, (experts_folder.resolve(), harness, Path.cwd())), os.environ.get("PYTHONPATH", "")]
    # `python -m` would look into the working directory first, where another `experts` may be
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
