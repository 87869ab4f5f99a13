"""What tells two environments apart, by name, and the environments beside results. No torch here."""

from dataclasses import dataclass

from moebench.machine.environment import TIMED_LIBRARIES, Environment
from moebench.machine.units import size

#: What may be allowed to differ, besides the libraries: the keys of `facts`.
HARDWARE = ("device", "gpu", "driver", "power", "clocks", "cpu", "threads", "python")
CHANGES = (*HARDWARE, *TIMED_LIBRARIES)
#: With another of these, allocations differ although the code does not, and to allow them makes no sense of bytes.
MEMORY_CHANGES = frozenset({"device", "gpu", "torch", "env_id"})
#: These cost time, not memory.
TIME_CHANGES = frozenset({"driver", "power", "clocks", "cpu", "threads", "python"})
#: A GPU at its power limit lowers its clock the more a kernel draws: less than this is the code's own doing.
RUN_CLOCK_TOLERANCE = 0.1


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
        "gpu": each(*(f"{gpu.name} ({size(gpu.memory_bytes, '.1f')}, {gpu.sm_count} SMs)" for gpu in gpus)),
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
    if not baseline_mhz or not candidate_mhz or abs(candidate_mhz / baseline_mhz - 1) <= RUN_CLOCK_TOLERANCE:
        return ()
    return (Difference("clocks", _number(baseline_mhz, "MHz"), _number(candidate_mhz, "MHz")),)
