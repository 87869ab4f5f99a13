"""Measure the time of each part of a forward pass under expert parallelism: dispatch, compute, combine."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from moebench.measure import clock
from moebench.measure.samplers import keep_busy
from moebench.workload.ranks import Ranks

SAMPLES = 10
PART_COLUMNS = ("dispatch_ms", "compute_ms", "combine_ms")


def breakdown(
    module: nn.Module,
    forward: Callable[[], object],
    device: torch.device,
    ranks: Ranks,
    prepare: Callable[[], None] = lambda: None,
    hidden_ms: float = 0.0,
) -> dict[str, float]:
    """Return the time of each part, in milliseconds. The parts add up to the time of a forward pass.

    The time of a sample is the time of its slowest rank, as in moebench.measure.timing, and its parts are the parts of
    that rank. The parts that are returned are those of the sample with the median time. What the layer does before it
    calls the dispatcher belongs to dispatch, and what it does after the dispatcher's combine belongs to combine.

    `prepare` runs before each forward, untimed. After it, a GPU is kept busy for `hidden_ms`. If the host hands over
    the whole forward in this time, the parts have only the time of the GPU. The dict is empty for one rank, and for a
    module without a dispatcher. The marks between parts are in the stream that computes. If work runs in another
    stream, its time counts in the part that waits for it.
    """
    dispatcher: Any = getattr(module, "dispatcher", None)
    if dispatcher is None or ranks.ep_size == 1:
        return {}
    listener: Any = _Listener(dispatcher, device)
    module.dispatcher = listener
    try:
        samples = []
        for _ in range(SAMPLES):
            prepare()
            if device.type == "cuda":
                keep_busy(hidden_ms)
            ranks.align(device)
            samples.append(listener.parts_ms(forward))
    finally:
        module.dispatcher = dispatcher
    of_ranks = ranks.tell(samples)
    slowest = [max(same, key=sum) for same in zip(*of_ranks, strict=True)]
    return dict(zip(PART_COLUMNS, sorted(slowest, key=sum)[(SAMPLES - 1) // 2], strict=True))


class _Listener:
    """A dispatcher that calls another dispatcher, and marks when its dispatch ends and when its combine starts."""

    def __init__(self, dispatcher: Any, device: torch.device) -> None:
        self._dispatcher = dispatcher
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def dispatch(self, *tensors: Any) -> Any:
        sent = self._dispatcher.dispatch(*tensors)
        self._marks.append(self._mark())
        return sent

    def combine(self, *tensors: Any) -> Any:
        self._marks.append(self._mark())
        return self._dispatcher.combine(*tensors)

    def parts_ms(self, forward: Callable[[], object]) -> list[float]:
        """Call `forward`, and return the milliseconds of its dispatch, compute and combine."""
        self._marks = [self._mark()]
        forward()
        marks = [*self._marks, self._mark()]
        if self._on_gpu:
            clock.wait_for(marks[-1])
            return [clock.ms_between(*pair) for pair in pairwise(marks)]
        return [(end - start) * 1e3 for start, end in pairwise(marks)]

    def _mark(self) -> Any:
        return clock.mark() if self._on_gpu else clock.perf_counter()
