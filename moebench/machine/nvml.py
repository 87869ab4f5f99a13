"""Read GPUs through NVIDIA's management library (NVML), which needs no privileges, no CUDA context and no torch.

A measurement goes on without NVML and records which values are not known. If the machine has no NVML, or if NVML does
not know the GPU, `nvml_error` says so. If the GPU does not answer a query, the query's field is None.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

#: Bits of nvmlDeviceGetCurrentClocksEventReasons, fixed by NVML's interface. Each is a reason for a lower clock.
CLOCKS_EVENT_REASONS = MappingProxyType(
    {
        0x001: "gpu_idle",
        0x002: "applications_clocks_setting",
        0x004: "sw_power_cap",
        0x008: "hw_slowdown",
        0x010: "sync_boost",
        0x020: "sw_thermal_slowdown",
        0x040: "hw_thermal_slowdown",
        0x080: "hw_power_brake_slowdown",
        0x100: "display_clock_setting",
    }
)

#: Reasons that make a measurement slower than on the same GPU on another day. The power cap is left out, because a GPU
#: normally runs dense matrix products at its power cap.
SLOWED_DOWN = frozenset({"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"})


#: A number that fits into 64 bits, as every fact about a machine does.
Number = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class GpuReading(BaseModel):
    """One GPU at one moment. None means that this GPU or this driver does not report the value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    uuid: str | None = None
    memory_bytes: Number | None = None
    driver_version: str | None = None
    power_limit_w: float | None = None
    max_sm_clock_mhz: Number | None = None
    max_memory_clock_mhz: Number | None = None
    sm_clock_mhz: Number | None = None
    memory_clock_mhz: Number | None = None
    power_w: float | None = None
    temperature_c: Number | None = None
    throttle_reasons: tuple[str, ...] | None = None
    nvml_error: str | None = None


class GpuUse(BaseModel):
    """Who else uses a GPU: the other processes that have a CUDA context on it, and how busy the GPU is.

    `capability` is the compute capability, which decides what can use the GPU.

    None means that NVML does not report the value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    other_pids: tuple[int, ...] | None = None
    busy_percent: int | None = None
    capability: tuple[int, int] | None = None


class Clock(BaseModel):
    """The clock of a GPU's multiprocessors at one moment, and the reasons in `SLOWED_DOWN` that held at that moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sm_clock_mhz: int | None = None
    slowed_down: tuple[str, ...] = ()


class NvmlUnavailable(Exception):
    """NVML is not available on this machine; the message says why."""


@contextmanager
def nvml() -> Iterator[Any]:
    """Yield the pynvml module, initialised while the block runs.

    Raises NvmlUnavailable if pynvml is not installed or NVML does not start.
    """
    try:
        import pynvml
    except ImportError as error:
        raise NvmlUnavailable("nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(f"NVML: {error}") from error
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def read(uuid: str) -> GpuReading:
    """Read the GPU with that uuid ("GPU-…") now.

    A value that NVML does not report is None. If NVML reports no value at all, `nvml_error` says why.
    """
    try:
        with nvml() as library:
            try:
                handle = library.nvmlDeviceGetHandleByUUID(uuid)
            except library.NVMLError as error:
                return GpuReading(nvml_error=f"NVML: {error}")
            return _read(library, handle)
    except NvmlUnavailable as error:
        return GpuReading(nvml_error=str(error))


@contextmanager
def clock_of(uuid: str) -> Iterator[Callable[[], Clock]]:
    """Yield a function that reads the GPU's clock. Each call costs two queries of NVML.

    A clock that NVML does not report is None.
    """
    look: Callable[[], Clock] = Clock
    with ExitStack() as stack:
        with suppress(NvmlUnavailable):
            library = stack.enter_context(nvml())
            handle = _ask(library, library.nvmlDeviceGetHandleByUUID, uuid)
            if handle is not None:
                look = partial(_clock, library, handle)
        yield look


def _clock(library: Any, handle: Any) -> Clock:
    mhz = _ask(library, library.nvmlDeviceGetClockInfo, handle, library.NVML_CLOCK_SM)
    reasons = _ask(library, library.nvmlDeviceGetCurrentClocksEventReasons, handle)
    slowed_down = tuple(name for name in _reason_names(reasons or 0) if name in SLOWED_DOWN)
    return Clock(sm_clock_mhz=mhz, slowed_down=slowed_down)


def full_uuid(uuid: str) -> str:
    """Return the uuid as NVML writes it. torch leaves the prefix "GPU-" out."""
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def read_all() -> list[tuple[GpuReading, GpuUse]]:
    """Read every GPU of the machine in NVML's order, whatever CUDA_VISIBLE_DEVICES says.

    Raises NvmlUnavailable as `nvml` does.
    """
    with nvml() as library:
        return [_read_index(library, index) for index in range(_ask(library, library.nvmlDeviceGetCount) or 0)]


def _read_index(library: Any, index: int) -> tuple[GpuReading, GpuUse]:
    try:
        handle = library.nvmlDeviceGetHandleByIndex(index)
    except library.NVMLError as error:  # a GPU that fell off the bus still gets a reading
        return GpuReading(nvml_error=f"NVML: {error}"), GpuUse()
    return _read(library, handle), _use(library, handle)


def _read(library: Any, handle: Any) -> GpuReading:
    def ask(query: Callable[..., Any], *arguments: Any) -> Any:
        return _ask(library, query, *arguments)

    memory = ask(library.nvmlDeviceGetMemoryInfo, handle)
    reasons = ask(library.nvmlDeviceGetCurrentClocksEventReasons, handle)
    return GpuReading(
        name=ask(library.nvmlDeviceGetName, handle),
        uuid=ask(library.nvmlDeviceGetUUID, handle),
        memory_bytes=None if memory is None else memory.total,
        driver_version=ask(library.nvmlSystemGetDriverVersion),
        power_limit_w=_watts(ask(library.nvmlDeviceGetEnforcedPowerLimit, handle)),
        max_sm_clock_mhz=ask(library.nvmlDeviceGetMaxClockInfo, handle, library.NVML_CLOCK_SM),
        max_memory_clock_mhz=ask(library.nvmlDeviceGetMaxClockInfo, handle, library.NVML_CLOCK_MEM),
        sm_clock_mhz=ask(library.nvmlDeviceGetClockInfo, handle, library.NVML_CLOCK_SM),
        memory_clock_mhz=ask(library.nvmlDeviceGetClockInfo, handle, library.NVML_CLOCK_MEM),
        power_w=_watts(ask(library.nvmlDeviceGetPowerUsage, handle)),
        temperature_c=ask(library.nvmlDeviceGetTemperature, handle, library.NVML_TEMPERATURE_GPU),
        throttle_reasons=None if reasons is None else _reason_names(reasons),
    )


def _use(library: Any, handle: Any) -> GpuUse:
    processes = _ask(library, library.nvmlDeviceGetComputeRunningProcesses, handle)
    busy = _ask(library, library.nvmlDeviceGetUtilizationRates, handle)
    return GpuUse(
        other_pids=None if processes is None else tuple(p.pid for p in processes if p.pid != os.getpid()),
        busy_percent=None if busy is None else busy.gpu,
        capability=_ask(library, library.nvmlDeviceGetCudaComputeCapability, handle),
    )


def _ask(library: Any, query: Callable[..., Any], *arguments: Any) -> Any:
    """Return the answer, or None where NVML raises because a GPU, driver or sandbox does not support the query."""
    try:
        return query(*arguments)
    except library.NVMLError:
        return None


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _reason_names(bits: int) -> tuple[str, ...]:
    """Return the names of the set bits, and one hexadecimal number for the bits that CLOCKS_EVENT_REASONS lacks."""
    known = [name for bit, name in CLOCKS_EVENT_REASONS.items() if bits & bit]
    unknown = bits & ~sum(CLOCKS_EVENT_REASONS)
    return (*known, hex(unknown)) if unknown else tuple(known)
