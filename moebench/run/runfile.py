"""Read and write run.json, which says what a run measures, and find changes that speak against resuming the run."""

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moebench.errors import UsageError, first_mistake
from moebench.machine.comparability import differences
from moebench.machine.environment import Environment
from moebench.names import Name, is_file
from moebench.results.files import ENVIRONMENT_NAME, ENVIRONMENTS_NAME, write_atomically
from moebench.workload.case import Job, JobKey
from moebench.workload.models import Model

RUN_NAME = "run.json"
SWEEP_NAME = "sweep.toml"
#: Each round has a plan of its own.
MOST_ROUNDS = 10_000


class Asked(BaseModel):
    """The options of a command that decide what is measured. A run that is resumed takes them from run.json."""

    model_config = ConfigDict(frozen=True)

    backends: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    case_ids: tuple[str, ...] = ()
    device: str | None = None
    rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS)] = 1
    profile: bool = False
    model: Model | None = None
    subject: str | None = None


class RunFile(BaseModel):
    """run.json: when the run began, by which command, and what it measures.

    `resumed` has one entry for each command that resumed the run: its time, then the command.
    """

    model_config = ConfigDict(frozen=True)

    run_id: Name
    moebench: str
    started: str
    command: str
    sweep: str
    sweep_file: str
    sweep_sha256: str
    jobs_sha256: str
    num_jobs: int
    num_rounds: int
    asked: Asked
    resumed: tuple[str, ...] = ()

    @property
    def content(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()

    def write(self, folder: Path) -> None:
        write_atomically(folder / RUN_NAME, self.content)

    @classmethod
    def read(cls, folder: Path) -> "RunFile":
        """Read the run of a folder. Raises UsageError where the folder has no run.json that this moebench can read."""
        try:
            return cls.model_validate_json((folder / RUN_NAME).read_bytes())
        except OSError as error:
            raise UsageError(
                f"--resume {folder}: {RUN_NAME}: {error.strerror}; give a folder that `moebench run` wrote"
            ) from error
        except ValidationError as error:
            raise UsageError(
                f"--resume {folder}: {RUN_NAME}: {first_mistake(error)}; "
                "give a folder that this version of moebench wrote"
            ) from error

    def changes(self, folder: Path, jobs: Iterable[Job]) -> list[str]:
        """Return what has changed since the run began, except for the environment (see `environment_changes`)."""
        found = []
        there = Path(self.sweep_file)
        if is_file(there) and digest(there.read_bytes()) != self.sweep_sha256:
            found.append(f"{there} has changed since {self.started}")
        if digest((folder / SWEEP_NAME).read_bytes()) != self.sweep_sha256:
            found.append(f"{folder / SWEEP_NAME} has been edited")
        elif digest_jobs(jobs) != self.jobs_sha256:
            found.append(f"this moebench makes other jobs of {folder / SWEEP_NAME} than moebench {self.moebench} did")
        return found


def sweeps_of(folder: Path) -> list[str]:
    """Return the sweep of the run in a folder: the sweep's file, then its name, as far as run.json has them.

    This function also reads older run files, which `RunFile.read` refuses. The list is empty for a folder without a
    run, for example a folder of `moebench merge`.
    """
    try:
        found = json.loads((folder / RUN_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    names = [found.get(name) for name in ("sweep_file", "sweep")] if isinstance(found, dict) else []
    return [name for name in names if isinstance(name, str)]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_jobs(jobs: Iterable[Job]) -> str:
    case_id = cache(lambda case: case.case_id)  # the backends of a case share it
    keys = (JobKey(case_id(job.case), job.backend, job.dispatcher, job.check) for job in jobs)
    return digest("\n".join(sorted(" ".join(map(str, key)) for key in keys)).encode())


def environment_changes(folder: Path, now: Environment) -> list[str]:
    """Return what differs between the environment of a folder's results and the environment `now`.

    Of a folder with the results of several environments, for example from a cluster, one of them has to be `now`.
    """
    file = folder / ENVIRONMENT_NAME
    if not file.exists():
        return []
    was = Environment.from_file(file)
    others = map(Environment.from_file, sorted((folder / ENVIRONMENTS_NAME).glob("*.json")))
    if any(not differences(other, now) and other.code == now.code for other in others):
        return []
    found = [str(difference) for difference in differences(was, now)]
    return found + [f"{name} {was.code[name]} -> {code}" for name, code in now.code.items() if code != was.code[name]]
