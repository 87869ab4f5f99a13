"""Compare two environments: name their facts, and find the differences that make timings incomparable."""

from dataclasses import dataclass

from moebench.machine.environment import TIMED_LIBRARIES, Environment
from moebench.machine.units import size

#: Names of the facts about hardware, driver, Python and the user's tiles that a user may allow to differ. The names are
#: keys of the result of `facts`, which also has the timed libraries.
HARDWARE = ("device", "gpu", "driver", "power", "clocks", "cpu", "threads", "python", "tiles")
CHANGES = (*HARDWARE, *TIMED_LIBRARIES)
#: A change of one of these facts changes allocations although the code is the same. Numbers of bytes are then not
#: comparable, even if the user allows the change.
MEMORY_CHANGES = frozenset({"device", "gpu", "torch", "env_id"})
#: A change of one of these facts changes times but not memory.
TIME_CHANGES = frozenset({"driver", "power", "clocks", "cpu", "threads", "python", "tiles"})
#: The largest relative difference of two runs' clocks that a change of the code can explain. At its power limit, a GPU
#: runs at a lower clock if a kernel draws more power.
RUN_CLOCK_TOLERANCE = 0.1

#: The smallest relative difference of two runs' clocks that a verdict on time names. A time is about proportional to
#: the reciprocal of the clock.
CLOCK_CHANGE = 0.01


@dataclass(frozen=True)
class Difference:
    """One fact that differs between two environments, the baseline's and the candidate's."""

    what: str  # one of CHANGES
    baseline: str
    candidate: str

    def __str__(self) -> str:
        return f"{self.what} {self.baseline} -> {self.candidate}"


def facts(environment: Environment) -> dict[str, str]:
    """Return the facts that `env_id` is a hash of, as text, by the name under which a user may allow a change."""
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
        "tiles": environment.tiles or "default",
        **{name: environment.versions.get(name) or "none" for name in TIMED_LIBRARIES},
    }


def _number(value: float | None, unit: str) -> str:
    return "unknown" if value is None else f"{value:g} {unit}"


def differences(baseline: Environment, candidate: Environment) -> tuple[Difference, ...]:
    """Return the facts that differ between two environments and make their timings incomparable."""
    one, two = facts(baseline), facts(candidate)
    return tuple(Difference(what, one[what], two[what]) for what in one if one[what] != two[what])


def clock_difference(baseline_mhz: float | None, candidate_mhz: float | None) -> tuple[Difference, ...]:
    """Return the difference of two jobs' clocks where it exceeds RUN_CLOCK_TOLERANCE, else an empty tuple.

    A change of the code does not explain so large a difference; locked clocks or heat do.
    """
    if not baseline_mhz or not candidate_mhz or abs(candidate_mhz / baseline_mhz - 1) <= RUN_CLOCK_TOLERANCE:
        return ()
    return (Difference("clocks", _number(baseline_mhz, "MHz"), _number(candidate_mhz, "MHz")),)


def clock_change(baseline_mhz: float | None, candidate_mhz: float | None) -> str:
    """Return in words how the GPU's clock changed; empty if it changed by less than CLOCK_CHANGE or is not known."""
    if not baseline_mhz or not candidate_mhz:
        return ""
    change = candidate_mhz / baseline_mhz - 1
    if abs(change) < CLOCK_CHANGE:
        return ""
    direction = "lower" if change < 0 else "higher"
    return f"the GPU's clock was {abs(change):.1%} {direction} ({baseline_mhz:g} -> {candidate_mhz:g} MHz)"


def node_change(baseline: object, candidate: object) -> str:
    """Return in words that two rows are of different nodes; empty if they are of one, or if a node has no name.

    GPUs of one model differ in speed by a percent or two.
    """
    if not (isinstance(baseline, str) and isinstance(candidate, str)) or baseline == candidate:
        return ""
    return f"the baseline is of another node ({baseline} -> {candidate})"
