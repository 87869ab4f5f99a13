"""Which kernel really ran: a call under torch's profiler."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MAX_NAME = 80
CPU_CALLS = 3


def executed(call: Callable[[], object], device: torch.device) -> str | None:
    """The operator that took most of a call's time and, under it, the kernel: "aten::_grouped_mm > aten::mm".

    On a GPU times and kernels are the device's; on a CPU, where a call may be disturbed, times are the medians of a few
    calls. A backend that fell back to another one shows it here, whatever its name.
    """
    _profiled(call, device)  # warms up, the call and the profiler both
    calls = [_profiled(call, device) for _ in range(1 if device.type == "cuda" else CPU_CALLS)]
    by_chain = {chain: statistics.median(one.get(chain, 0.0) for one in calls) for one in calls for chain in one}
    return max(by_chain, key=lambda chain: by_chain[chain], default=None)


def _profiled(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    by_chain: dict[str, float] = {}
    for chain, duration in _gpu_kernels(profiler) if on_gpu else _cpu_operators(profiler):
        by_chain[chain] = by_chain.get(chain, 0.0) + duration
    return by_chain


def _gpu_kernels(profiler: Any) -> list[tuple[str, float]]:
    return [
        (f"{_operators(event)[0]} > {_short(kernel.name)}", kernel.duration)
        for event in profiler.events()
        for kernel in event.kernels
    ]


def _cpu_operators(profiler: Any) -> list[tuple[str, float]]:
    chains = [(_operators(event), event.self_cpu_time_total) for event in profiler.events()]
    return [(" > ".join(dict.fromkeys((chain[0], chain[-1]))), duration) for chain, duration in chains if chain]


def _operators(event: Any) -> list[str]:
    """Names of the aten operators around an event, outermost first; the event's own name where there are none."""
    chain = []
    ancestor = event
    while ancestor is not None:
        chain.append(ancestor.name)
        ancestor = ancestor.cpu_parent
    return [name for name in reversed(chain) if "::" in name] or [event.name]


def _short(kernel: str) -> str:
    return kernel if len(kernel) <= MAX_NAME else kernel[: MAX_NAME - 1] + "…"
