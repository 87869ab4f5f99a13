"""Run calls under torch's profiler.

The profile shows which kernel really ran, and how long the GPU was busy in a call. It can also be written as a trace
for a viewer.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from moebench.measure import clock
from moebench.measure.samplers import L2Flush, Stage
from moebench.results.stats import series_interval
from moebench.workload.ranks import Ranks

MAX_NAME = 80
#: Matches the names of matrix products, both of torch's operators and of the libraries' kernels.
PRODUCT = re.compile(r"mm\b|gemm|matmul|linear|nvjet|cutlass|cublas", re.IGNORECASE)
CPU_CALLS = 3
TRACED_CALLS = 3
#: Matches the names of the kernels of NCCL, NVSHMEM, DeepEP and torch's symmetric memory. Such a kernel waits for other
#: ranks while it runs, so its time depends on when the other ranks' hosts launch theirs.
COMMUNICATION = re.compile(r"nccl|nvshmem|deep_ep::(intranode|internode)|symm_mem|symmetric_memory", re.IGNORECASE)
#: Matches the CUDA functions that launch a kernel, as the profiler names them.
LAUNCH = re.compile(r"cu(da)?Launch(Cooperative)?Kernel")
#: The kernel of torch.cuda._sleep. One before and one after each call mark the call on the GPU's own clock.
MARK = "spin_kernel"
#: A call cannot keep the GPU busy for longer than it takes. The profiled calls are other calls than the timed ones, so
#: this share of the time is allowed.
MOST_BUSY = 1.1
#: The flag of a call that waits for the GPU, but whose busy time is not known. The row's `detail` says why.
NO_BUSY_TIME = "no_busy_time"


def executed(call: Callable[[], object], device: torch.device) -> str | None:
    """Return the matrix product that took most of a call's time, and its kernel: "aten::_grouped_mm > aten::mm".

    The result shows whether a backend fell back to another backend, whatever its name is. If no operator launched the
    kernel, only the kernel's name is returned. On a GPU, times and kernels are those of the device. On a CPU, other
    processes may disturb a call, so times are the medians of a few calls. PRODUCT recognises a product by its kernel's
    name or, if no kernel matches, by its operator's name. For a call without a product, the result is the kernel or
    operator that took most of the time.
    """
    _profiled(call, device)  # warms up both the call and the profiler
    calls = [_profiled(call, device) for _ in range(1 if device.type == "cuda" else CPU_CALLS)]
    by_chain = {chain: statistics.median(one.get(chain, 0.0) for one in calls) for one in calls for chain in one}
    by_kernel = [chain for chain in by_chain if PRODUCT.search(chain.rpartition(" > ")[2])]
    by_operator = [chain for chain in by_chain if PRODUCT.search(chain)]
    return max(by_kernel or by_operator or by_chain, key=lambda chain: by_chain[chain], default=None)


def trace(stages: Sequence[Callable[[], object]], clear: Callable[[], None], device: torch.device, path: Path) -> None:
    """Write a Chrome trace (JSON, for Perfetto or chrome://tracing) of a few calls; each call runs all stages."""
    with _profiler(device, record_shapes=True) as profiler:
        for number in range(TRACED_CALLS):
            with record_function(f"call {number}"):
                for stage in stages:
                    stage()
                if device.type == "cuda":
                    clock.synchronize(device)
            clear()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


@dataclass(frozen=True)
class Busy:
    """The milliseconds in which the GPU was busy, for each profiled call.

    If they are not known, `samples_ms` is empty and `unknown` says why. Both are empty if nothing was profiled.
    """

    samples_ms: tuple[float, ...] = ()
    unknown: str = ""

    def within(self, time_ms: float) -> "Busy":
        """Return the busy time of calls that take `time_ms`. It is not known if it is longer than the calls."""
        median_ms = statistics.median(self.samples_ms) if self.samples_ms else 0.0
        if median_ms <= MOST_BUSY * time_ms:
            return self
        return Busy(unknown=f"the profile has {median_ms:.4g} ms of work in a call of {time_ms:.4g} ms")

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of results that have the busy time or, if it is not known, the reason."""
        found = series_interval(self.samples_ms) if self.samples_ms else (None, None, None)
        columns = dict(zip(("busy_ms", "busy_ms_low", "busy_ms_high"), found, strict=True))
        detail = {"detail": f"busy_ms is not known: {self.unknown}"} if self.unknown else {}
        return {**columns, "busy_samples_ms": self.samples_ms or None, **detail}

    @property
    def flags(self) -> tuple[str, ...]:
        return (NO_BUSY_TIME,) if self.unknown else ()


def busy_of_calls(
    stages: Sequence[Stage], device: torch.device, num_calls: int, cold_l2: bool, prepare: Stage, ranks: Ranks
) -> Busy:
    """Return how long the GPU is busy in each of `num_calls` calls of all stages, which must be warm.

    The GPU is busy while a kernel, a copy or a memset runs. A time in which several of them run counts once. `prepare`
    runs before each call and does not count. With several ranks, kernels that communicate do not count, and the result
    of a call is that of the rank whose GPU is busy longest. All ranks must make this call together.
    """
    flush = L2Flush(device, cold_l2)
    with _profiler(device, operators=False) as profiler:
        for _ in range(num_calls):
            prepare()
            flush()
            ranks.align(device)
            torch.cuda._sleep(1)
            clock.synchronize(device)  # so that no stream of the call starts before the mark
            for stage in stages:
                stage()
            clock.synchronize(device)
            torch.cuda._sleep(1)
        clock.synchronize(device)
    mine = busy_in_calls(profiler.events(), num_calls, COMMUNICATION if ranks.size > 1 else None)
    return _busiest(ranks.tell(mine))


def busy_in_calls(events: Iterable[Any], num_calls: int, left_out: re.Pattern[str] | None) -> Busy:
    """Return the busy time of each call in a profile whose calls lie between two kernels `MARK` each.

    Kernels whose name matches `left_out` do not count. The result is not known unless the profile has every kernel that
    was launched, and every mark.
    """
    events = list(events)
    on_gpu = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    launched = {event.id for event in events if event.device_type.name == "CPU" and LAUNCH.match(event.name)}
    recorded = launched & {event.id for event in on_gpu}
    if len(recorded) < len(launched) or not launched:
        return Busy(unknown=f"the profiler recorded {len(recorded)} of {len(launched)} kernels")
    on_gpu.sort(key=lambda event: event.time_range.start)
    marks = [place for place, event in enumerate(on_gpu) if MARK in event.name]
    if len(marks) != 2 * num_calls:
        return Busy(unknown=f"the profile has {len(marks)} marks around {num_calls} calls, not {2 * num_calls}")
    calls = [on_gpu[start + 1 : end] for start, end in zip(marks[::2], marks[1::2], strict=True)]
    return Busy(tuple(busy_us(_spans(call, left_out)) / 1e3 for call in calls))


def _spans(call: Iterable[Any], left_out: re.Pattern[str] | None) -> list[tuple[float, float]]:
    counted = [event.time_range for event in call if left_out is None or not left_out.search(event.name)]
    return [(span.start, span.end) for span in counted]


def busy_us(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans of time, each with its start and its end in microseconds."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _busiest(by_rank: Sequence[Busy]) -> Busy:
    """Return the busy time of the rank that is busy longest, call by call."""
    for rank, one in enumerate(by_rank):
        if one.unknown:
            return Busy(unknown=f"rank {rank}: {one.unknown}" if len(by_rank) > 1 else one.unknown)
    samples_ms = tuple(max(call) for call in zip(*(one.samples_ms for one in by_rank), strict=True))
    return Busy(samples_ms) if min(samples_ms) > 0 else Busy(unknown="the profile has a call without work on a GPU")


def _profiler(device: torch.device, record_shapes: bool = False, operators: bool = True) -> torch.profiler.profile:
    """Return a profiler of the device. On a GPU, it can leave out torch's operators, which take time on the host."""
    activities = [ProfilerActivity.CPU] * operators + [ProfilerActivity.CUDA] * (device.type == "cuda")
    # without acc_events, torch 2.11 warns about profiling cycles, although there is only one
    return clock.profile(activities=activities, acc_events=True, record_shapes=record_shapes)


def _profiled(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    on_gpu = device.type == "cuda"
    profiler: Any = _profiler(device) if on_gpu else clock.profile_operators(use_kineto=True, acc_events=True)
    with profiler:
        call()
        if on_gpu:
            clock.synchronize(device)
    by_chain: dict[str, float] = {}
    for chain, duration in _gpu_kernels(profiler) if on_gpu else _cpu_operators(profiler):
        by_chain[chain] = by_chain.get(chain, 0.0) + duration
    return by_chain


def _gpu_kernels(profiler: Any) -> list[tuple[str, float]]:
    """Return (name, µs) of each kernel: below the operator that launched it or, if none did, by its own name."""
    events = profiler.events()
    launched = [(event, kernel) for event in events for kernel in event.kernels]
    found = [(f"{_operators(event)[0]} > {_short(kernel.name)}", kernel.duration) for event, kernel in launched]
    of_operators = Counter(kernel.name for _, kernel in launched)
    for event in events:
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            of_operators[event.name] -= 1
            if of_operators[event.name] < 0:
                found.append((_short(event.name), event.time_range.elapsed_us()))
    return found


def _cpu_operators(profiler: Any) -> list[tuple[str, float]]:
    chains = [(_operators(event), event.self_cpu_time_total) for event in profiler.function_events]
    return [(" > ".join(dict.fromkeys((chain[0], chain[-1]))), duration) for chain, duration in chains if chain]


def _operators(event: Any) -> list[str]:
    """Return the names of the operators around an event, outermost first; the event's own name if there are none."""
    chain = []
    ancestor = event
    while ancestor is not None:
        chain.append(ancestor.name)
        ancestor = ancestor.cpu_parent
    return [name for name in reversed(chain) if "::" in name] or [event.name]


def _short(kernel: str) -> str:
    return kernel if len(kernel) <= MAX_NAME else kernel[: MAX_NAME - 1] + "…"
