"""Read the state of this process that a backend may leave changed, apart from torch's settings."""

import gc
import inspect
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch

#: Libraries that a backend loads set variables with these beginnings. A new one of them is not told.
OF_LIBRARIES = ("CUDA_", "CUBLAS_", "KMP_", "NCCL_", "NVTE_", "PYTORCH_", "TORCH", "TRITON_", "XLA_")
#: Libraries keep descriptors and threads. More descriptors than this are told.
KEPT_DESCRIPTORS = 256
#: Threads that wait for work spin for a while first. This process is looked at in so many windows of so many seconds,
#: until its other threads and its children leave most of a window unused.
WINDOWS, WINDOW_S, BUSY_SHARE = 20, 0.025, 0.1
#: The beginnings of the names of modules whose functions are looked at.
_MODULES = ("builtins", "time", "os", "gc", "random", "threading", "torch", "torch.nn.functional", "torch.autograd")
_CLASSES = (torch.Tensor, torch.nn.Module)

_process_s, _thread_s, _sleep = time.process_time, time.thread_time, time.sleep


def _working_folder() -> object:
    with suppress(OSError):
        return Path.cwd()
    return None


def _umask() -> int:
    now = os.umask(0o077)
    os.umask(now)
    return now


def _signals() -> object:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    timers = [signal.getitimer(timer)[1] for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)]
    return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, ()), timers


def _interpreter() -> object:
    hooks = sys.gettrace(), sys.getprofile(), threading.gettrace(), threading.getprofile(), sys.excepthook
    collector = gc.isenabled(), gc.get_threshold()
    return hooks, collector, sys.getrecursionlimit(), sys.getswitchinterval(), sys.stdout, sys.stderr, sys.stdin


def _limits() -> object:
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {name: resource.getrlimit(getattr(resource, name)) for name in names}


def _descriptors() -> dict[int, tuple[int, int]] | None:
    """Return what each open descriptor leads to; None where the list cannot be read, for which one must be free."""
    try:
        names = [path.name for path in Path("/proc/self/fd").iterdir()]
    except OSError:
        return None
    found = {}
    for name in names:
        with suppress(OSError):  # the descriptor of the listing itself is closed by now
            now = os.fstat(int(name))
            found[int(name)] = now.st_dev, now.st_ino
    return found


def _functions() -> dict[str, object]:
    """Return the functions and classes that modules hold, by their full names."""
    own = [name for name in sys.modules if name.partition(".")[0] in ("experts", "moebench")]
    named = [(name, sys.modules[name]) for name in (*_MODULES, *own) if sys.modules.get(name) is not None]
    held = [(f"{name}.{key}", value) for name, module in named for key, value in vars(module).items()]
    for one in _CLASSES:  # also what a class inherits, because the class may hide it
        name = f"{one.__module__}.{one.__qualname__}"
        held += [(f"{name}.{key}", inspect.getattr_static(one, key, None)) for key in dir(one)]
    kinds = (property, classmethod, staticmethod)
    return {name: value for name, value in held if callable(value) or isinstance(value, kinds)}


def _package(value: object) -> str:
    return str(getattr(value, "__module__", None)).partition(".")[0]


#: Name of a part of the state, as `detail` has it -> its value now.
STATE: Mapping[str, Callable[[], object]] = {
    "working folder": _working_folder,
    "limits": _limits,
    "signal handlers": _signals,
    "umask": _umask,
    "priority": lambda: os.getpriority(os.PRIO_PROCESS, 0),
    "CPU affinity": lambda: os.sched_getaffinity(0),
    "interpreter": _interpreter,
    "sys.path": lambda: tuple(sys.path),
}


class State:
    """The state of this process when the object was made. `changes` compares the state with it."""

    def __init__(self) -> None:
        self._parts = {name: read() for name, read in STATE.items()}
        self._variables = dict(os.environ)
        self._descriptors, self._functions = _descriptors(), _functions()

    def changes(self) -> tuple[str, ...]:
        """Return what has changed since, in the words of docs/results.md."""
        return tuple(self._changes())

    def _changes(self) -> Iterator[str]:
        yield from (name for name, read in STATE.items() if read() != self._parts[name])
        if variables := self._changed_variables():
            yield f"environment ({', '.join(variables[:3])})"
        yield from self._changed_descriptors()
        if replaced := self._replaced_functions():
            yield f"functions ({', '.join(replaced[:3])})"
        if is_busy():
            yield "threads (some still compute)"

    def _replaced_functions(self) -> list[str]:
        """Return the names of functions that are gone, or that another package has replaced.

        torch replaces some of its own functions when it loads more of itself.
        """
        now = _functions()
        changed = [name for name, was in self._functions.items() if now.get(name) is not was]
        return [name for name in changed if name not in now or _package(now[name]) != name.partition(".")[0]]

    def _changed_descriptors(self) -> Iterator[str]:
        was, now = self._descriptors, _descriptors()
        if was is None:
            return
        if now is None:
            yield "descriptors (none is free)"
        elif len(now) - len(was) > KEPT_DESCRIPTORS:
            yield f"descriptors ({len(now) - len(was)} more are open)"
        elif any(now.get(number) != leads_to for number, leads_to in was.items()):
            yield "descriptors (one that was open is closed, or leads elsewhere)"

    def _changed_variables(self) -> list[str]:
        was, now = self._variables, dict(os.environ)
        new = [name for name in now.keys() - was.keys() if not name.startswith(OF_LIBRARIES)]
        return sorted([*new, *(name for name in was if now.get(name) != was[name])])


def is_busy() -> bool:
    """Whether other threads of this process, or its children, compute while this thread does nothing."""
    children = []
    with suppress(OSError):  # no descriptor is free
        children = psutil.Process().children(recursive=True)
    for _ in range(WINDOWS):
        before = _process_s() - _thread_s()
        _sleep(WINDOW_S)
        spent_s = _process_s() - _thread_s() - before
        if spent_s < BUSY_SHARE * WINDOW_S and not any(map(_computes, children)):
            return False
    return True


def _computes(child: psutil.Process) -> bool:
    with suppress(psutil.Error, OSError):
        return bool(child.status() == psutil.STATUS_RUNNING)
    return False
