"""Hold the clocks, the CUDA events and torch's profiler, and find out whether a backend has replaced one of them.

A worker imports this module before it imports any backend. The modules that measure take clocks and events from here.
A backend that later replaces `time.perf_counter` or a method of `torch.cuda.Event` therefore changes no measured time.
A backend runs in the process that measures it. It can still change this process in ways that nobody looks for here.
"""

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import profiler as autograd_profiler
from torch.autograd import profiler_util
from torch.profiler.profiler import _KinetoProfile

#: The steady clock, in seconds and in nanoseconds.
perf_counter, perf_counter_ns = time.perf_counter, time.perf_counter_ns
synchronize = torch.cuda.synchronize
profile = torch.profiler.profile
#: The part of torch's profiler that suffices on a CPU. `profile` would import the compiler, which takes seconds.
profile_operators = autograd_profiler.profile

_Event = torch.cuda.Event
_record, _elapsed_ms, _wait, _is_past = _Event.record, _Event.elapsed_time, _Event.synchronize, _Event.query
_current_stream = torch.cuda.current_stream


def mark() -> torch.cuda.Event:
    """Record an event with a time stamp on the current stream, and return the event."""
    event = _Event(enable_timing=True)
    _record(event, _current_stream())
    return event


def ms_between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Return the milliseconds on the GPU's clock between two events that have passed."""
    return float(_elapsed_ms(start, end))


def wait_for(event: torch.cuda.Event) -> None:
    """Wait until the GPU has passed the event."""
    _wait(event)


def is_past(event: torch.cuda.Event) -> bool:
    """Whether the GPU has passed the event."""
    return bool(_is_past(event))


def finish(device: torch.device) -> None:
    """Wait until a GPU has done its work. A CPU always has."""
    if device.type == "cuda":
        synchronize(device)


class Phases:
    """The wall-clock seconds of a job's parts, by the name of their column. A part inside another counts once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inside_s = 0.0
        self.spent_s: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        started, before_s, self._inside_s = perf_counter(), self._inside_s, 0.0
        try:
            yield
        finally:
            finish(self._device)
            whole_s = perf_counter() - started
            self.spent_s[name] = self.spent_s.get(name, 0.0) + whole_s - self._inside_s
            self._inside_s = before_s + whole_s


def replaced() -> tuple[str, ...]:
    """Return the names of the clocks, events and parts of the profiler that are no longer what they were at import."""
    return tuple(name for name, holder, attribute, genuine in _GENUINE if _now(holder, attribute) is not genuine)


def _now(holder: Any, attribute: str) -> Any:
    return inspect.getattr_static(holder, attribute, None)


#: The modules and classes in which every function is looked at, and the single names in other modules.
_WHOLE: dict[str, Any] = {
    "time": time,
    "torch.cuda.Event": torch.cuda.Event,
    "torch.profiler.profile": torch.profiler.profile,
    "torch.profiler.profiler._KinetoProfile": _KinetoProfile,
    "torch.autograd.profiler.profile": autograd_profiler.profile,
    "torch.autograd.profiler_util.EventList": profiler_util.EventList,
    "torch.autograd.profiler_util.FunctionEvent": profiler_util.FunctionEvent,
}
_SINGLE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "torch.cuda": (torch.cuda, ("Event", "synchronize", "current_stream", "CUDAGraph", "_sleep")),
    "torch.profiler": (torch.profiler, ("profile", "record_function")),
}


def _watched() -> Iterator[tuple[str, Any, str]]:
    for name, holder in _WHOLE.items():  # also what a class inherits, because the class may hide it
        yield from ((name, holder, attribute) for attribute in dir(holder) if _is_function(_now(holder, attribute)))
    for name, (holder, attributes) in _SINGLE.items():
        yield from ((name, holder, attribute) for attribute in attributes)


def _is_function(value: Any) -> bool:
    return callable(value) or isinstance(value, property | classmethod | staticmethod)


_GENUINE = tuple(
    (f"{name}.{attribute}", holder, attribute, _now(holder, attribute)) for name, holder, attribute in _watched()
)
