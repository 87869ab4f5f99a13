"""Measure the time of each part of a forward pass under expert parallelism: dispatch, compute, combine."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moebench.measure import clock
from moebench.workload.ranks import Ranks

SAMPLES = 10
PART_COLUMNS = ("dispatch_ms", "compute_ms", "combine_ms")


def breakdown(
    module: nn.Module,
    forward: Callable[[], object],
    device: torch.device,
    ranks: Ranks,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the median time of each part, in milliseconds, on the rank where this part is slowest.

    `prepare` runs before each forward, untimed. The dict is empty for one rank, and for a module without a dispatcher.
    The marks between parts are in the stream that computes. If work runs in another stream, its time counts in the part
    that waits for it.
    """
    dispatcher: Any = getattr(module, "dispatcher", None)
    if dispatcher is None or ranks.size == 1:
        return {}
    listener: Any = _Listener(dispatcher, device)
    module.dispatcher = listener
    try:
        samples = []
        for _ in range(SAMPLES):
            prepare()
            ranks.align(device)
            forward()
            samples.append(listener.parts_ms())
    finally:
        module.dispatcher = dispatcher
    medians = [statistics.median(part) for part in zip(*samples, strict=True)]
    slowest = [max(part) for part in zip(*ranks.tell(medians), strict=True)]
    return dict(zip(PART_COLUMNS, slowest, strict=True))


class _Listener:
    """A dispatcher that calls another dispatcher and marks when each of its calls starts and ends."""

    def __init__(self, dispatcher: Any, device: torch.device) -> None:
        self._dispatcher = dispatcher
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def dispatch(self, *tensors: Any) -> Any:
        self._marks = [self._mark()]
        sent = self._dispatcher.dispatch(*tensors)
        self._marks.append(self._mark())
        return sent

    def combine(self, *tensors: Any) -> Any:
        self._marks.append(self._mark())
        summed = self._dispatcher.combine(*tensors)
        self._marks.append(self._mark())
        return summed

    def parts_ms(self) -> list[float]:
        """Return the milliseconds of dispatch, compute and combine of the last forward pass."""
        marks = self._marks
        if self._on_gpu:
            clock.wait_for(marks[-1])
            return [clock.ms_between(marks[i], marks[i + 1]) for i in range(len(PART_COLUMNS))]
        return [(marks[i + 1] - marks[i]) * 1e3 for i in range(len(PART_COLUMNS))]

    def _mark(self) -> Any:
        return clock.mark() if self._on_gpu else clock.perf_counter()
