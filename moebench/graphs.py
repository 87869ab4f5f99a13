"""Whether a call can be captured in a CUDA graph, and its replay: kernels without the host that launches them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch

from moebench.samplers import Stage

#: Calls on the stream of the capture before it: libraries make their workspaces in them.
WARMUP_CALLS = 2


@contextmanager
def captured(stages: Sequence[Stage], prepare: Stage, device: torch.device) -> Iterator[Stage | None]:
    """The replay of all stages in one graph, or None for a call that cannot be captured.

    `prepare` runs before each call, never in the graph. Memory of the graph is freed at the end.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        yield graph.replay if _capture(graph, stages, prepare, device) else None
    finally:
        graph.reset()
        prepare()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: libraries keep a workspace for every stream that they see."""
    return torch.cuda.Stream(device)


def _capture(graph: torch.cuda.CUDAGraph, stages: Sequence[Stage], prepare: Stage, device: torch.device) -> bool:
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
    except RuntimeError:  # torch has ended the capture; what the call allocated in it goes with the graph
        return False
    return True
