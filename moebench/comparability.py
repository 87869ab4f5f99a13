"""What tells two environments apart, by name, and the environments beside results. No torch here."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moebench.environment import TIMED_LIBRARIES, Environment, EnvironmentFileError
from moebench.frame import ResultsError, load

ENVIRONMENT_NAME = "environment.json"
#: In a folder of results from several environments, one file each.
ENVIRONMENTS_NAME = "environments"

#: What may be allowed to differ, besides the libraries: the keys of `facts`.
HARDWARE = ("device", "gpu", "driver", "power", "clocks", "cpu", "threads", "python")
CHANGES = (*HARDWARE, *TIMED_LIBRARIES)
#: With another of these, allocations differ although the code does not, and to allow them makes no sense of bytes.
MEMORY_CHANGES = frozenset({"device", "gpu", "torch", "env_id"})
#: These cost time, not memory.
TIME_CHANGES = frozenset({"driver", "power", "clocks", "cpu", "threads", "python"})
#: A GPU at its power limit lowers its clock the more a kernel draws: less than this is the code's own doing.
CLOCK_TOLERANCE = 0.1


@dataclass(frozen=True)
class Difference:
    """One fact that differs between the environments of two sides."""

    what: str  # one of CHANGES
    baseline: str
    candidate: str

    def __str__(self) -> str:
        return f"{self.what} {self.baseline} -> {self.candidate}"


def facts(environment: Environment) -> dict[str, str]:
    """All that `env_id` is a hash of, in words, by the name under which a change of it is allowed."""
    gpus = environment.gpus

    def each(*texts: str) -> str:
        return ", ".join(sorted(set(texts))) or "none"

    return {
        "device": environment.device.partition(":")[0],
        "gpu": each(*(f"{gpu.name} ({gpu.memory_bytes / 2**30:.1f} GiB, {gpu.sm_count} SMs)" for gpu in gpus)),
        "driver": each(*(gpu.driver_version or "unknown" for gpu in gpus)),
        "power": each(*(_number(gpu.power_limit_w, "W") for gpu in gpus)),
        "clocks": each(*(_number(gpu.max_sm_clock_mhz, "MHz") for gpu in gpus)),
        "cpu": environment.cpu_model,
        "threads": str(environment.num_threads) if environment.device == "cpu" else "any",
        "python": ".".join(environment.python.split(".")[:2]),
        **{name: environment.versions.get(name) or "none" for name in TIMED_LIBRARIES},
    }


def _number(value: float | None, unit: str) -> str:
    return "unknown" if value is None else f"{value:g} {unit}"


def differences(baseline: Environment, candidate: Environment) -> tuple[Difference, ...]:
    """What of two environments differs and makes their timings incomparable."""
    one, two = facts(baseline), facts(candidate)
    return tuple(Difference(what, one[what], two[what]) for what in one if one[what] != two[what])


def clock_difference(baseline_mhz: float | None, candidate_mhz: float | None) -> tuple[Difference, ...]:
    """What two jobs' clocks differ by, if that is more than a change of the code explains: a lock, heat."""
    if not baseline_mhz or not candidate_mhz or abs(candidate_mhz / baseline_mhz - 1) <= CLOCK_TOLERANCE:
        return ()
    return (Difference("clocks", _number(baseline_mhz, "MHz"), _number(candidate_mhz, "MHz")),)


def environments_beside(path: Path) -> dict[str, Environment]:
    """The environments that lie beside the results in `path`, a folder or a Parquet file, by their env_id.

    Raises ResultsError for a file that is no environment.
    """
    folder = path if path.is_dir() else path.parent
    files = [folder / ENVIRONMENT_NAME, *sorted((folder / ENVIRONMENTS_NAME).glob("*.json"))]
    try:
        found = [Environment.from_file(file) for file in files if file.is_file()]
    except EnvironmentFileError as error:
        raise ResultsError(str(error)) from error
    by_id: dict[str, Environment] = {}
    for environment in found:  # of several of one id, which differ in revision alone, the run's own
        by_id.setdefault(environment.env_id, environment)
    return by_id


@dataclass(frozen=True)
class Result:
    """Results and the environments that they were measured in, by env_id; empty where no file tells."""

    frame: pd.DataFrame
    environments: Mapping[str, Environment]


def open_result(path: Path) -> Result:
    """The results in a folder or a Parquet file, with the environments beside them.

    Raises ResultsError for what is none, and for one without rows.
    """
    frame = load(path)
    if frame.empty:
        raise ResultsError(f"{path}: no rows of results yet; let `moebench run` measure a job first")
    return Result(frame, environments_beside(path))


@dataclass(frozen=True)
class Comparability:
    """Whether rows of two results may be compared, from the environments of both."""

    baseline: Mapping[str, Environment]
    candidate: Mapping[str, Environment]
    allowed: Collection[str] = ()  # of CHANGES

    def between(self, baseline_id: str, candidate_id: str) -> tuple[Difference, ...]:
        """What differs between two env_ids; one difference, of `env_id`, where no file says more."""
        if baseline_id == candidate_id:
            return ()
        one, two = self.baseline.get(baseline_id), self.candidate.get(candidate_id)
        found = differences(one, two) if one is not None and two is not None else ()
        return found or (Difference("env_id", baseline_id, candidate_id),)

    def forbidding(self, differences: Iterable[Difference]) -> tuple[Difference, ...]:
        """Those that were not allowed."""
        return tuple(difference for difference in differences if difference.what not in self.allowed)
