"""Measure the time of each part of a forward pass under expert parallelism (dispatch, compute, combine), and its bytes.

The bytes are those that a dispatch sends to other ranks for the rows of tokens.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moebench.measure import clock
from moebench.measure.ceilings import rows_between_ranks
from moebench.measure.samplers import keep_busy
from moebench.workload.backends import collective_of
from moebench.workload.case import Job
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
    job: Job | None = None,
) -> dict[str, float]:
    """Return the time of each part, in milliseconds. The parts add up to the time of a forward pass.

    For a job, the result also has `dispatch_bytes`, the bytes of the rank that sends most, in the last sample.

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
    parts = dict(zip(PART_COLUMNS, sorted(slowest, key=sum)[(SAMPLES - 1) // 2], strict=True))
    return parts if job is None else parts | {"dispatch_bytes": _dispatch_bytes(job, ranks, *listener.last)}


def _dispatch_bytes(job: Job, ranks: Ranks, x_TD: Tensor, indices_TK: Tensor, row_bytes: int | None) -> int:
    """Return the most bytes that any rank sends to other ranks. `row_bytes` is None for rows in the dtype of x."""
    row_bytes = row_bytes or x_TD.shape[1] * x_TD.itemsize
    if collective_of(job.dispatcher) == "all_gather":
        sharing = ranks.sharing
        return int(ranks.largest(x_TD.shape[0])) * (sharing.size - 1) * row_bytes
    send, _ = rows_between_ranks(indices_TK, job.case.n_routed_experts, ranks.sharing)
    return int(ranks.largest((sum(send) - send[ranks.ep_rank]) * row_bytes))


class _Listener:
    """A dispatcher that calls another dispatcher, and marks when its dispatch ends and when its combine starts."""

    def __init__(self, dispatcher: Any, device: torch.device) -> None:
        self._dispatcher = dispatcher
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        self.last: tuple[Any, Any, int | None] = None, None, None

    def dispatch(self, *tensors: Any) -> Any:
        sent = self._dispatcher.dispatch(*tensors)
        self._marks.append(self._mark())
        self.last = tensors[0], tensors[2], getattr(sent, "row_bytes", None)  # older revisions of experts have none
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
