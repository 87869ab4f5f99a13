"""What is measured in processes of its own, and what may go wrong before or while it is. No torch here."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import moebench
from moebench.machine.gpus import ANYWHERE, Slot
from moebench.workload.case import Job
from moebench.workload.spec import Policy


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
