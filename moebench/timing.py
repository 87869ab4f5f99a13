"""A callable -> time statistics. Knows no backend.

A sample runs the stages of one call back to back. On a GPU: CUDA events around each stage, the second-level cache
flushed before the first, and a short wait enqueued ahead so that the host has handed over all work when the clock
starts; a call that itself waits for the device cannot be helped so, and is flagged. On a CPU: the steady clock.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from moebench.stats import MIN_SAMPLES, median_interval, relative_half_width

Stage = Callable[[], object]

HOST_SAMPLES = 7
BATCH = 10
#: torch.cuda._sleep counts SM cycles; at the highest clock of current GPUs a millisecond has about this many.
CYCLES_PER_MS = 2.0e6
MAX_WAIT_MS = 20.0
#: A call whose host part takes this share of its whole time waits for the device somewhere inside.
SYNCHRONISING_SHARE = 0.9


@dataclass(frozen=True)
class TimingPolicy:
    """When sampling stops: the 95% interval of the median within ±`interval_target`, or `time_cap_s` spent."""

    interval_target: float
    time_cap_s: float
    cold_l2: bool = True

    @staticmethod
    def default(device: torch.device) -> "TimingPolicy":
        on_gpu = device.type == "cuda"
        return TimingPolicy(interval_target=0.005 if on_gpu else 0.02, time_cap_s=1.0)


@dataclass(frozen=True)
class Timing:
    """Statistics of one call; `samples_ms` holds the whole call, `stage_ms` the median of each stage."""

    samples_ms: tuple[float, ...]
    stage_ms: tuple[float, ...]
    time_ms: float
    time_ms_low: float | None
    time_ms_high: float | None
    converged: bool
    host_time_ms: float
    flags: tuple[str, ...]


def measure(
    stages: Sequence[Stage], device: torch.device, policy: TimingPolicy, prepare: Stage = lambda: None
) -> Timing:
    """Sample the stages, already warm, until the policy is met. `prepare` runs, untimed, before each sample."""
    sampler = _GpuSampler(stages, device, policy, prepare) if device.type == "cuda" else _CpuSampler(stages, prepare)
    samples: list[tuple[float, ...]] = []
    start = time.perf_counter()
    while True:
        samples += sampler.sample(BATCH, policy.time_cap_s - (time.perf_counter() - start))
        totals = [sum(sample) for sample in samples]
        median, low, high = median_interval(totals)
        converged = relative_half_width(median, low, high) <= policy.interval_target
        if converged or (time.perf_counter() - start >= policy.time_cap_s and len(samples) >= MIN_SAMPLES):
            break
    return Timing(
        samples_ms=tuple(totals),
        stage_ms=tuple(statistics.median(stage) for stage in zip(*samples, strict=True)),
        time_ms=median,
        time_ms_low=low,
        time_ms_high=high,
        converged=converged,
        host_time_ms=sampler.host_time_ms(),
        flags=sampler.flags,
    )


class _CpuSampler:
    flags: tuple[str, ...] = ()

    def __init__(self, stages: Sequence[Stage], prepare: Stage) -> None:
        self._stages, self._prepare = stages, prepare
        self._totals_ms: list[float] = []

    def sample(self, count: int, seconds: float) -> list[tuple[float, ...]]:
        """Up to `count` samples, fewer once `seconds` are over."""
        samples: list[tuple[float, ...]] = []
        end = time.perf_counter() + seconds
        while len(samples) < count and (not samples or time.perf_counter() < end):
            self._prepare()
            marks = [time.perf_counter_ns()]
            for stage in self._stages:
                stage()
                marks.append(time.perf_counter_ns())
            samples.append(tuple((b - a) / 1e6 for a, b in pairwise(marks)))
        self._totals_ms += [sum(sample) for sample in samples]
        return samples

    def host_time_ms(self) -> float:
        """On a CPU the call is the host's."""
        return statistics.median(self._totals_ms)


class _GpuSampler:
    def __init__(self, stages: Sequence[Stage], device: torch.device, policy: TimingPolicy, prepare: Stage) -> None:
        self._stages, self._device, self._prepare = stages, device, prepare
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device) if policy.cold_l2 else None
        host_ms, enqueue_ms = zip(*(self._host_sample() for _ in range(HOST_SAMPLES)), strict=True)
        self._host_time_ms: float = statistics.median(host_ms)
        enqueue = statistics.median(enqueue_ms)
        synchronises = enqueue > SYNCHRONISING_SHARE * self._host_time_ms and enqueue > 0.1
        self.flags = ("synchronises",) if synchronises else ()
        self._wait_cycles = 0 if synchronises else int(min(1.5 * enqueue, MAX_WAIT_MS) * CYCLES_PER_MS)

    def _make_cold(self) -> None:
        if self._flush is not None:
            self._flush.zero_()

    def _host_sample(self) -> tuple[float, float]:
        """Milliseconds on the host's clock from an idle device to an idle device, and until all work was enqueued."""
        self._prepare()
        self._make_cold()
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for stage in self._stages:
            stage()
        enqueued = time.perf_counter()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) * 1e3, (enqueued - start) * 1e3

    def sample(self, count: int, seconds: float) -> list[tuple[float, ...]]:
        """Up to `count` samples, fewer once `seconds` are over on the host; the device is idle afterwards."""
        rows: list[list[torch.cuda.Event]] = []
        end = time.perf_counter() + seconds
        while len(rows) < count and (not rows or time.perf_counter() < end):
            self._prepare()
            self._make_cold()
            if self._wait_cycles:
                torch.cuda._sleep(self._wait_cycles)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(len(self._stages) + 1)]
            events[0].record()
            for stage, event in zip(self._stages, events[1:], strict=True):
                stage()
                event.record()
            rows.append(events)
        torch.cuda.synchronize(self._device)
        return [tuple(a.elapsed_time(b) for a, b in pairwise(row)) for row in rows]

    def host_time_ms(self) -> float:
        return self._host_time_ms
