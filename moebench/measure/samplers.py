"""Time one call on the device's own clock, in groups of samples. This module knows no backend.

A sample runs the stages of one call back to back. On a CPU, its times come from the steady clock. On a GPU, they come
from CUDA events around each stage. The L2 cache is flushed before the first stage. A short wait is enqueued before the
call, so that the host has handed over all work when the clock starts. This does not work for a call that itself waits
for the device. Such a call gets the flag `synchronises`.

Two functions of the caller run outside of the sample: `prepare` before each sample, and `keep` after each sample, as
soon as the clock was read. On a GPU, work that `keep` enqueues on the current stream follows the event that ends the
sample. What it copies there shows work that the call left to another stream and did not wait for. After a sample on the
host's clock, which waits for all streams, `keep` does not run.
"""

import ctypes
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Protocol

import torch

from moebench.machine import nvml
from moebench.machine.nvml import Clock
from moebench.measure import clock
from moebench.workload.ranks import ALONE, Ranks

Stage = Callable[[], object]
CPU = torch.device("cpu")

HOST_SAMPLES = 7
#: If the first three samples on the host's clock took longer than this, no more are taken.
HOST_SAMPLES_S = 0.05
#: torch.cuda._sleep counts SM cycles. At the highest clock of current GPUs, a millisecond has about this many.
CYCLES_PER_MS = 2.0e6
MAX_WAIT_MS = 20.0
#: CU_LIMIT_PERSISTING_L2_CACHE_SIZE of the CUDA driver's API.
_LIMIT_PERSISTING_L2 = 6
#: The time to enqueue a short call varies: it was 4 to 20 µs on the host of an H200, 2026-11.
MIN_WAIT_MS = 0.03


@dataclass(frozen=True)
class Group:
    """Samples taken one after the other, each with the milliseconds of its stages, and the GPU's clock around them.

    `skews_ms` has, for each sample, the difference between the slowest and the fastest rank. A sampler leaves the list
    empty. The list is filled when the groups of all ranks are merged.
    """

    samples: list[tuple[float, ...]]
    skews_ms: list[float]
    clock: Clock

    @property
    def totals_ms(self) -> list[float]:
        return [sum(sample) for sample in self.samples]


class Sampler(Protocol):
    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of a record that these samples cause."""

    def sample(self, count: int) -> Group:
        """Take a group of `count` samples on this rank."""

    def host_time_ms(self) -> float:
        """Return the milliseconds of a call on the host's clock."""


class _CpuSampler:
    flags: tuple[str, ...] = ()

    def __init__(self, stages: Sequence[Stage], prepare: Stage, keep: Stage, ranks: Ranks) -> None:
        self._stages, self._prepare, self._keep, self._ranks = stages, prepare, keep, ranks
        self._totals_ms: list[float] = []

    def sample(self, count: int) -> Group:
        group = Group([self._one() for _ in range(count)], [], Clock())
        self._totals_ms += group.totals_ms
        return group

    def _one(self) -> tuple[float, ...]:
        self._prepare()
        self._ranks.align(CPU)
        marks = [clock.perf_counter_ns()]
        for stage in self._stages:
            stage()
            marks.append(clock.perf_counter_ns())
        self._keep()
        return tuple((b - a) / 1e6 for a, b in pairwise(marks))

    def host_time_ms(self) -> float:
        """Return the median of all samples: on a CPU they are already on the host's clock."""
        return statistics.median(self._totals_ms)


class _GpuSampler:
    def __init__(
        self,
        stages: Sequence[Stage],
        device: torch.device,
        cold_l2: bool,
        prepare: Stage,
        keep: Stage,
        ranks: Ranks,
        read_clock: Callable[[], Clock],
    ) -> None:
        self._stages, self._device, self._prepare, self._keep, self._ranks = stages, device, prepare, keep, ranks
        self._read_clock, self._flush = read_clock, L2Flush(device, cold_l2)
        self._host_time_ms = self._median_on_host()
        enqueue_ms, synchronises = self._enqueue_behind_a_wait()
        self.flags = ("synchronises",) if synchronises else ()
        self._wait_ms = 0.0 if synchronises else 1.5 * enqueue_ms + MIN_WAIT_MS

    def _median_on_host(self) -> float:
        started, samples = clock.perf_counter(), [self._host_sample() for _ in range(3)]
        long = self._ranks.largest(clock.perf_counter() - started) > HOST_SAMPLES_S
        return statistics.median(samples + [self._host_sample() for _ in range(0 if long else HOST_SAMPLES - 3)])

    def _host_sample(self) -> float:
        """Return the milliseconds of a call on the host's clock, from an idle device to an idle device."""
        self._prepare()
        self._flush()
        self._ranks.align(self._device)
        clock.synchronize(self._device)
        start = clock.perf_counter()
        for stage in self._stages:
            stage()
        clock.synchronize(self._device)
        return (clock.perf_counter() - start) * 1e3

    def _enqueue_behind_a_wait(self) -> tuple[float, bool]:
        """Return the milliseconds until the host has handed over all work, and whether it waited for the device.

        The device is kept busy for longer than the whole call takes. If the host is done before the device is free, it
        did not wait.
        """
        self._prepare()
        clock.synchronize(self._device)
        torch.cuda._sleep(int((2 * self._host_time_ms + 1.0) * CYCLES_PER_MS))  # longer than MAX_WAIT_MS if need be
        free = clock.mark()
        start = clock.perf_counter()
        self._enqueue()
        enqueue_ms = (clock.perf_counter() - start) * 1e3
        synchronises = clock.is_past(free)
        clock.synchronize(self._device)
        return enqueue_ms, synchronises

    def _enqueue(self) -> list[torch.cuda.Event]:
        """Enqueue the call, with an event before each stage and after the last."""
        events = [clock.mark()]
        for stage in self._stages:
            stage()
            events.append(clock.mark())
        return events

    def sample(self, count: int) -> Group:
        rows: list[list[torch.cuda.Event]] = []
        for _ in range(count):
            self._prepare()
            self._flush()
            keep_busy(self._wait_ms)
            self._ranks.align(self._device)
            rows.append(self._enqueue())
            self._keep()
        while_busy = self._read_clock()
        clock.synchronize(self._device)
        samples = [tuple(clock.ms_between(a, b) for a, b in pairwise(row)) for row in rows]
        return Group(samples, [], slower([while_busy, self._read_clock()]))

    def host_time_ms(self) -> float:
        return self._host_time_ms


def keep_busy(wait_ms: float) -> None:
    """Let the current stream wait for `wait_ms`, but at most `MAX_WAIT_MS`."""
    if wait_ms > 0:
        torch.cuda._sleep(int(min(wait_ms, MAX_WAIT_MS) * CYCLES_PER_MS))


class L2Flush:
    """Makes a GPU's L2 cache cold by writing a buffer of twice its size. It does nothing if `cold_l2` is false."""

    def __init__(self, device: torch.device, cold_l2: bool) -> None:
        self._device, self._persisting = device, PersistingL2()
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device) if cold_l2 else None

    def __call__(self) -> None:
        if self._buffer is not None:
            if self._persisting.set_aside_bytes():
                clock.synchronize(self._device)  # an earlier call that still runs could write into this part again
                self._persisting.reset()
            self._buffer.zero_()


class PersistingL2:
    """The part of the L2 cache that a process may set aside for data that it marks as persisting.

    Writing a buffer does not evict such data. The calls go to the driver's library, for the context of this thread. If
    the driver has no such calls, nothing can be set aside, and 0 bytes are.
    """

    def __init__(self) -> None:
        self._driver: ctypes.CDLL | None = None
        with suppress(OSError):
            driver = ctypes.CDLL("libcuda.so.1")
            if hasattr(driver, "cuCtxResetPersistingL2Cache"):  # since CUDA 11
                self._driver = driver

    def set_aside_bytes(self) -> int:
        """Return the bytes of L2 that are set aside now; 0 if the driver does not tell."""
        found = ctypes.c_size_t()
        if self._driver is None or self._driver.cuCtxGetLimit(ctypes.byref(found), _LIMIT_PERSISTING_L2):
            return 0
        return found.value

    def reset(self) -> None:
        """Make persisting data ordinary data, which the next flush evicts."""
        if self._driver is not None:
            self._driver.cuCtxResetPersistingL2Cache()


def slower(clocks: Sequence[Clock]) -> Clock:
    known = [clock.sm_clock_mhz for clock in clocks if clock.sm_clock_mhz is not None]
    reasons = dict.fromkeys(reason for clock in clocks for reason in clock.slowed_down)
    return Clock(sm_clock_mhz=min(known, default=None), slowed_down=tuple(reasons))


@contextmanager
def make_sampler(
    stages: Sequence[Stage], device: torch.device, cold_l2: bool, prepare: Stage, keep: Stage, ranks: Ranks
) -> Iterator[Sampler]:
    """Yield the device's sampler of these stages. The stages must be warm."""
    if device.type != "cuda":
        yield _CpuSampler(stages, prepare, keep, ranks)
        return
    with nvml.clock_of(nvml.full_uuid(str(torch.cuda.get_device_properties(device).uuid))) as read_clock:
        yield _GpuSampler(stages, device, cold_l2, prepare, keep, ranks, read_clock)


#: The number of calls on the capture's stream before the capture. Libraries make their workspaces in these calls.
WARMUP_CALLS = 2


@contextmanager
def captured(
    stages: Sequence[Stage], prepare: Stage, device: torch.device, ranks: Ranks = ALONE
) -> Iterator[Stage | None]:
    """Yield the replay of all stages in one CUDA graph, or None if a rank cannot capture the call.

    `prepare` runs before each call and never in the graph. The memory of the graph is freed at the end. A graph may
    wait for the same graph of the other ranks, so all ranks must replay it equally often.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        yield graph.replay if all(ranks.tell(_capture(graph, stages, prepare, device))) else None
    finally:
        graph.reset()
        prepare()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for all captures, because libraries keep a workspace for every stream that they see."""
    return torch.cuda.Stream(device)


def _free_generator() -> None:
    """Let torch's generator leave a capture that CUDA itself has ended. A copy of its state is in no capture."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def _capture(graph: torch.cuda.CUDAGraph, stages: Sequence[Stage], prepare: Stage, device: torch.device) -> bool:
    """Capture the stages, and return whether this succeeded. No rank waits in a capture, because nothing of it runs."""
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_CALLS):
            prepare()
            for stage in stages:
                stage()
        prepare()
    torch.cuda.synchronize(device)
    try:
        with torch.cuda.graph(graph, stream=stream):
            for stage in stages:
                stage()
    except Exception:  # torch has ended the capture; the graph's reset frees what the call allocated in it
        _free_generator()
        return False
    return True
