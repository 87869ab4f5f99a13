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
from typing import Protocol

import torch

from moebench.peers import ALONE, Peers
from moebench.stats import MIN_SAMPLES, median_interval, relative_half_width

Stage = Callable[[], object]
CPU = torch.device("cpu")

HOST_SAMPLES = 7
BATCH = 20
#: Sampling does not stop before so many samples for being precise: a handful may agree by chance.
CONVERGED_SAMPLES = 20
#: torch.cuda._sleep counts SM cycles; at the highest clock of current GPUs a millisecond has about this many.
CYCLES_PER_MS = 2.0e6
MAX_WAIT_MS = 20.0
#: Enqueueing a short call takes its ups and downs: 4 to 20 µs on an H200's host, 2026-11.
MIN_WAIT_MS = 0.03


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
    """Statistics of one call; `samples_ms` holds the whole call, `stage_ms` the median of each stage.

    With ranks, each sample is the slowest rank's, and `skew_ms` the median of how much later it was than the fastest.
    """

    samples_ms: tuple[float, ...]
    stage_ms: tuple[float, ...]
    time_ms: float
    time_ms_low: float | None
    time_ms_high: float | None
    converged: bool
    host_time_ms: float
    skew_ms: float | None
    flags: tuple[str, ...]


def measure(
    stages: Sequence[Stage],
    device: torch.device,
    policy: TimingPolicy,
    prepare: Stage = lambda: None,
    peers: Peers = ALONE,
) -> Timing:
    """Sample the stages, already warm, until the policy is met. `prepare` runs, untimed, before each sample.

    Ranks start every sample together; a sample's time is that of its slowest rank.
    """
    sampler: _Sampler = (
        _GpuSampler(stages, device, policy, prepare, peers)
        if device.type == "cuda"
        else _CpuSampler(stages, prepare, peers)
    )
    samples: list[tuple[float, ...]] = []
    skews_ms: list[float] = []
    start, count = time.perf_counter(), MIN_SAMPLES
    while True:
        by_rank = peers.tell(sampler.sample(count))
        for ranks in zip(*by_rank, strict=True):
            totals_ms = [sum(stage_ms) for stage_ms in ranks]
            samples.append(ranks[totals_ms.index(max(totals_ms))])
            skews_ms.append(max(totals_ms) - min(totals_ms))
        median, low, high = median_interval([sum(sample) for sample in samples])
        converged = relative_half_width(median, low, high) <= policy.interval_target
        spent = peers.largest(time.perf_counter() - start)  # one clock for all, so that all go on or none
        if spent >= policy.time_cap_s or (converged and len(samples) >= CONVERGED_SAMPLES):
            break
        affordable = int((policy.time_cap_s - spent) / (spent / len(samples)))
        count = max(1, min(BATCH, affordable))
    return Timing(
        samples_ms=tuple(sum(sample) for sample in samples),
        stage_ms=tuple(statistics.median(stage) for stage in zip(*samples, strict=True)),
        time_ms=median,
        time_ms_low=low,
        time_ms_high=high,
        converged=converged,
        host_time_ms=peers.largest(sampler.host_time_ms()),
        skew_ms=statistics.median(skews_ms) if peers.size > 1 else None,
        flags=sampler.flags,
    )


class _Sampler(Protocol):
    @property
    def flags(self) -> tuple[str, ...]:
        """What is peculiar about the samples."""

    def sample(self, count: int) -> list[tuple[float, ...]]:
        """Milliseconds of each stage, `count` times."""

    def host_time_ms(self) -> float:
        """Milliseconds of a call on the host's clock."""


class _CpuSampler:
    flags: tuple[str, ...] = ()

    def __init__(self, stages: Sequence[Stage], prepare: Stage, peers: Peers) -> None:
        self._stages, self._prepare, self._peers = stages, prepare, peers
        self._totals_ms: list[float] = []

    def sample(self, count: int) -> list[tuple[float, ...]]:
        samples = [self._one() for _ in range(count)]
        self._totals_ms += [sum(sample) for sample in samples]
        return samples

    def _one(self) -> tuple[float, ...]:
        self._prepare()
        self._peers.align(CPU)
        marks = [time.perf_counter_ns()]
        for stage in self._stages:
            stage()
            marks.append(time.perf_counter_ns())
        return tuple((b - a) / 1e6 for a, b in pairwise(marks))

    def host_time_ms(self) -> float:
        """On a CPU the call is the host's."""
        return statistics.median(self._totals_ms)


class _GpuSampler:
    def __init__(
        self, stages: Sequence[Stage], device: torch.device, policy: TimingPolicy, prepare: Stage, peers: Peers
    ) -> None:
        self._stages, self._device, self._prepare, self._peers = stages, device, prepare, peers
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device) if policy.cold_l2 else None
        self._host_time_ms: float = statistics.median(self._host_sample() for _ in range(HOST_SAMPLES))
        enqueue_ms, synchronises = self._enqueue_behind_a_wait()
        self.flags = ("synchronises",) if synchronises else ()
        wait_ms = min(1.5 * enqueue_ms + MIN_WAIT_MS, MAX_WAIT_MS)
        self._wait_cycles = 0 if synchronises else int(wait_ms * CYCLES_PER_MS)

    def _make_cold(self) -> None:
        if self._flush is not None:
            self._flush.zero_()

    def _host_sample(self) -> float:
        """Milliseconds on the host's clock from an idle device to an idle device."""
        self._prepare()
        self._make_cold()
        self._peers.align(self._device)
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for stage in self._stages:
            stage()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) * 1e3

    def _enqueue_behind_a_wait(self) -> tuple[float, bool]:
        """Milliseconds until the host has handed over all work, and whether it had to wait for the device on the way.

        The device is kept busy for longer than the whole call takes: who is through before it is free did not wait.
        """
        self._prepare()
        torch.cuda.synchronize(self._device)
        free = torch.cuda.Event()
        torch.cuda._sleep(int((2 * self._host_time_ms + 1.0) * CYCLES_PER_MS))
        free.record()
        start = time.perf_counter()
        self._enqueue()
        enqueue_ms = (time.perf_counter() - start) * 1e3
        synchronises = free.query()
        torch.cuda.synchronize(self._device)
        return enqueue_ms, synchronises

    def _enqueue(self) -> list[torch.cuda.Event]:
        """Hand over the call, with an event before each stage and after the last."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(self._stages) + 1)]
        events[0].record()
        for stage, event in zip(self._stages, events[1:], strict=True):
            stage()
            event.record()
        return events

    def sample(self, count: int) -> list[tuple[float, ...]]:
        rows: list[list[torch.cuda.Event]] = []
        for _ in range(count):
            self._prepare()
            self._make_cold()
            if self._wait_cycles:
                torch.cuda._sleep(self._wait_cycles)
            self._peers.align(self._device)
            rows.append(self._enqueue())
        torch.cuda.synchronize(self._device)
        return [tuple(a.elapsed_time(b) for a, b in pairwise(row)) for row in rows]

    def host_time_ms(self) -> float:
        return self._host_time_ms
