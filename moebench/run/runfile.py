"""A run's folder: what it was asked for, who writes into it, and whether it can be gone on with. No torch here."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from moebench.errors import UsageError
from moebench.machine.comparability import differences
from moebench.machine.environment import Environment
from moebench.results.files import write_atomically
from moebench.results.folder import ENVIRONMENT_NAME
from moebench.workload.case import Job

RUN_NAME = "run.json"
SWEEP_NAME = "sweep.toml"


class Asked(BaseModel):
    """What of a command line decides what is measured. A run that is resumed takes it from here."""

    model_config = ConfigDict(frozen=True)

    backends: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    case_ids: tuple[str, ...] = ()
    device: str | None = None
    rounds: int = 1
    profile: bool = False


class RunFile(BaseModel):
    """run.json: when, by which command, what. `resumed` has the commands that went on with it, each after its time."""

    model_config = ConfigDict(frozen=True)

    run_id: str
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

    def write(self, folder: Path) -> None:
        write_atomically(folder / RUN_NAME, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "RunFile":
        """The run of a folder. Raises UsageError for what is none."""
        try:
            return cls.model_validate_json((folder / RUN_NAME).read_bytes())
        except OSError as error:
            raise UsageError(
                f"--resume {folder}: {RUN_NAME}: {error.strerror}; give a folder of `moebench run`"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise UsageError(
                f"--resume {folder}: {RUN_NAME}: {place}: {first['msg']}; it is not of a run that this moebench began"
            ) from error

    def changes(self, folder: Path, jobs: Iterable[Job]) -> list[str]:
        """What is no longer as it was when the run began, but for where it runs."""
        found = []
        there = Path(self.sweep_file)
        if there.is_file() and digest(there.read_bytes()) != self.sweep_sha256:
            found.append(f"{there} has changed since {self.started}")
        if digest((folder / SWEEP_NAME).read_bytes()) != self.sweep_sha256:
            found.append(f"{folder / SWEEP_NAME} has been edited")
        elif digest_jobs(jobs) != self.jobs_sha256:
            found.append(f"this moebench makes other jobs of {folder / SWEEP_NAME} than the {self.moebench} of then")
        return found


def sweeps_of(folder: Path) -> list[str]:
    """The sweep of the run in a folder: its file, then its name, as far as run.json has them.

    Of older run files too, which `RunFile.read` refuses; none where a folder is no run's, as that of a merge.
    """
    try:
        found = json.loads((folder / RUN_NAME).read_bytes())
    except (OSError, ValueError):
        return []
    return [found[name] for name in ("sweep_file", "sweep") if name in found] if isinstance(found, dict) else []


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_jobs(jobs: Iterable[Job]) -> str:
    return digest("\n".join(sorted(" ".join(map(str, job.key)) for job in jobs)).encode())


def environment_changes(folder: Path, now: Environment) -> list[str]:
    """What differs between the environment that a folder's results were measured in and this one."""
    file = folder / ENVIRONMENT_NAME
    if not file.exists():
        return []
    was = Environment.from_file(file)
    found = [str(difference) for difference in differences(was, now)]
    return found + [f"{name} {was.code[name]} -> {code}" for name, code in now.code.items() if code != was.code[name]]
