"""Run calls under torch's profiler, to find which kernel really ran and to write traces for a viewer."""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from moebench.measure import clock

MAX_NAME = 80
#: Matches the names of matrix products, both of torch's operators and of the libraries' kernels.
PRODUCT = re.compile(r"mm\b|gemm|matmul|linear|nvjet|cutlass|cublas", re.IGNORECASE)
CPU_CALLS = 3
TRACED_CALLS = 3


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


def _profiler(device: torch.device, record_shapes: bool = False) -> torch.profiler.profile:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    # without acc_events, torch 2.11 warns about profiling cycles, although there is only one
    return clock.profile(activities=activities, acc_events=True, record_shapes=record_shapes)


def _profiled(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    on_gpu = device.type == "cuda"
    with _profiler(device) as profiler:
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
    chains = [(_operators(event), event.self_cpu_time_total) for event in profiler.events()]
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
