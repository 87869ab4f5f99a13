"""Decide when a run ends early: its time is spent, or a signal came."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Stop:
    """Whether a run should end: its time is spent (start no new job), or a signal came (end at once)."""

    deadline: float | None = None
    interrupted: bool = False

    @classmethod
    def after(cls, budget_s: float | None) -> "Stop":
        return cls(None if budget_s is None else time.monotonic() + budget_s)

    def __call__(self) -> bool:
        return self.interrupted or _past(self.deadline)

    @contextmanager
    def at_signals(self) -> Iterator[None]:
        """Note signals while the block runs.

        The run acts on a signal only between two looks at its workers, so that no line of the journal is cut off.
        """

        def note(number: int, frame: FrameType | None) -> None:
            self.interrupted = True

        with _at_signals(note):
            yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn each of SIGNALS into KeyboardInterrupt while the block runs, so that unfinished work is cleaned up."""
    with _at_signals(signal.default_int_handler):
        yield


@contextmanager
def _at_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
