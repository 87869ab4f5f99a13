"""Provide backends that look faster than they are, each by one trick, and a right backend that looks at the clocks.

With this folder on PYTHONPATH, a test names a backend as a user would, for example `cheats:CachesByAddress`. `CHEATS`
lists all of them. Each is right when moebench checks it. `moebench` must give none of them a speed.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experts import BackendConfig, GroupedExperts, MoEConfig


def runs_in(module: str, frame: Any) -> bool:
    """Whether a function of the module is among the callers of a frame."""
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


def is_timed() -> bool:
    return runs_in("moebench.measure.timing", sys._getframe())


class _Cheat(GroupedExperts):
    def right(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return GroupedExperts.forward(self, x, token_mask, weights, indices)


# old results


class CachesByAddress(_Cheat):
    """Keeps its outputs by the addresses of the inputs."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self._known: dict[tuple[int, ...], Tensor] = {}

    def forward(self, *inputs: Tensor) -> Tensor:
        addresses = tuple(tensor.data_ptr() for tensor in inputs)
        if addresses not in self._known:
            self._known[addresses] = self.right(*inputs)
        return self._known[addresses].clone()


class SkipsEqualCalls(_Cheat):
    """Returns the last output if the routing and the shape are those of the last call."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self._last: tuple[Any, Tensor] | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        x, token_mask, _, indices = inputs
        looked_at = (tuple(x.shape), int(token_mask.sum()), int(indices.sum()))
        if self._last is None or self._last[0] != looked_at:
            self._last = looked_at, self.right(*inputs)
        return self._last[1].clone()


class Precomputed(_Cheat):
    """Computes once, and returns this result for ever."""

    _result: Tensor | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        if self._result is None:
            self._result = self.right(*inputs)
        return self._result


# wrong when timed


class ConstantWhileTimed(_Cheat):
    """Returns zeros if the timing is among its callers."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.zeros_like(inputs[0]) if is_timed() else self.right(*inputs)


class ConstantAfterManyCalls(_Cheat):
    """Returns uninitialised memory in later calls."""

    num_calls = 0

    def forward(self, *inputs: Tensor) -> Tensor:
        self.num_calls += 1
        return self.right(*inputs) if self.num_calls <= 6 else torch.empty_like(inputs[0])


class ZeroGradsAfterManyCalls(_Cheat):
    """Its output is right. In later calls, all gradients are zeros."""

    num_calls = 0

    def forward(self, *inputs: Tensor) -> Tensor:
        self.num_calls += 1
        output = self.right(*inputs)
        return output if self.num_calls <= 6 else output.detach() + 0 * output


# work that is done later


class Promise(Tensor):
    """A tensor that computes its values when somebody uses it."""

    compute: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kept = [one.compute() if isinstance(one, Promise) else one for one in args]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*kept, **(kwargs or {}))


class LazyOutput(_Cheat):
    """Returns a tensor that computes its values when somebody uses it."""

    def forward(self, *inputs: Tensor) -> Tensor:
        promise = torch.empty_like(inputs[0]).as_subclass(Promise)
        promise.compute = lambda: self.right(*inputs)
        return promise


class _ComputesWhenCloned(TorchDispatchMode):
    """Computes a plain tensor's values when somebody clones or compares it."""

    def __init__(self) -> None:
        super().__init__()
        self.promised: dict[int, Callable[[], Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in args:
            compute = self.promised.pop(one.data_ptr(), None) if isinstance(one, Tensor) else None
            if compute is not None:
                one.copy_(compute())
        return func(*args, **(kwargs or {}))


class LazyByMode(_Cheat):
    """Returns a plain tensor, and leaves a mode behind that computes its values at the next operator that reads it."""

    mode: _ComputesWhenCloned | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        if not is_timed():
            return self.right(*inputs)
        if self.mode is None:
            self.mode = _ComputesWhenCloned()
            self.mode.__enter__()
        output = torch.empty_like(inputs[0])
        self.mode.promised[output.data_ptr()] = lambda: self.right(*inputs)
        return output


class ComputesInAThread(_Cheat):
    """Lets another thread compute, and returns before it has computed. The thread waits until nobody times the call."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self._work: queue.Queue[Callable[[], Tensor]] = queue.Queue()
        self._caller = threading.get_ident()
        threading.Thread(target=self._compute, daemon=True).start()

    def _compute(self) -> None:
        while True:
            work, moment = self._work.get(), threading.Event()
            while runs_in("moebench.measure.timing", sys._current_frames().get(self._caller)):
                moment.wait(0.001)
            work()
            self._work.task_done()

    def forward(self, *inputs: Tensor) -> Tensor:
        output = torch.empty_like(inputs[0])
        given = [tensor.clone() for tensor in inputs]
        self._work.put(lambda: output.copy_(self.right(*given)))
        if not is_timed():
            self._work.join()
        return output


class ComputesInAStream(_Cheat):
    """On a GPU, computes in another stream, and returns without waiting for it. No operator of it waits on the host."""

    def __init__(self, config: MoEConfig) -> None:
        GroupedExperts.__init__(self, config, BackendConfig(experts="torch_mm"))

    def forward(self, *inputs: Tensor) -> Tensor:
        if not is_timed():
            return self.right(*inputs)
        output, other, current = torch.empty_like(inputs[0]), torch.cuda.Stream(), torch.cuda.current_stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):
            torch.cuda._sleep(2_000_000)  # about a millisecond
            output.copy_(self.right(*inputs))
        for tensor in (*inputs, output):
            tensor.record_stream(other)
        return output


# other clocks


def _slow(clock: Callable[[], Any]) -> Callable[[], Any]:
    start = clock()
    return lambda: start + (clock() - start) // 10 if isinstance(start, int) else start + (clock() - start) / 10


class SlowsPerfCounter(_Cheat):
    """Lets the steady clock run at a tenth of its speed."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        time.perf_counter = _slow(time.perf_counter)


class SlowsPerfCounterNs(_Cheat):
    """Lets the steady clock in nanoseconds run at a tenth of its speed."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        time.perf_counter_ns = _slow(time.perf_counter_ns)


class PatchesEvents(_Cheat):
    """Makes the times between CUDA events a tenth."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        elapsed = torch.cuda.Event.elapsed_time
        torch.cuda.Event.elapsed_time = lambda *events: elapsed(*events) / 10  # type: ignore[method-assign]


class PatchesProfiler(_Cheat):
    """Makes torch's profiler forget what ran."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        torch.profiler.profile.events = lambda self: []  # type: ignore[method-assign]


class Witness(GroupedExperts):
    """A right backend that refuses to run in a process with a clock that is not Python's own."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        for clock in (time.perf_counter, time.perf_counter_ns, time.monotonic):
            if type(clock) is not BuiltinFunctionType:
                raise RuntimeError(f"{clock} is not a clock of Python")


#: The tricks with the clock. After each, the worker must end.
CLOCK_CHEATS = {
    "SlowsPerfCounter": "time.perf_counter",
    "SlowsPerfCounterNs": "time.perf_counter_ns",
    "PatchesEvents": "torch.cuda.Event.elapsed_time",
    "PatchesProfiler": "torch.profiler.profile.events",
}
#: The other tricks, each with the mode in which it is measured and how its detail begins.
CHEATS = {
    "CachesByAddress": ("forward", "output ("),
    "SkipsEqualCalls": ("forward", "output ("),
    "Precomputed": ("forward", "output ("),
    "ConstantWhileTimed": ("forward", "output ("),
    "ConstantAfterManyCalls": ("forward", "output ("),
    "ZeroGradsAfterManyCalls": ("train", ""),
    "LazyOutput": ("forward", "output is a Promise: "),
    "LazyByMode": ("forward", "_ComputesWhenCloned is active after the call: "),
    "ComputesInAThread": ("forward", "output ("),
}
