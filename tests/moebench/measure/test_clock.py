"""The clock module finds every clock that somebody replaced, and keeps on using the genuine ones."""

import time

import pytest
import torch

from moebench.measure import clock

PLACES = {
    "time.perf_counter": time,
    "time.perf_counter_ns": time,
    "time.monotonic": time,
    "time.sleep": time,
    "torch.cuda.synchronize": torch.cuda,
    "torch.cuda.current_stream": torch.cuda,
    "torch.cuda.Event": torch.cuda,
    "torch.cuda.Event.record": torch.cuda.Event,
    "torch.cuda.Event.elapsed_time": torch.cuda.Event,
    "torch.cuda.Event.__new__": torch.cuda.Event,
    "torch.profiler.profile": torch.profiler,
    "torch.profiler.profile.__enter__": torch.profiler.profile,
    "torch.profiler.profile.events": torch.profiler.profile,
}


def test_at_first_nothing_is_replaced():
    assert clock.replaced() == ()


@pytest.mark.parametrize("name", PLACES)
def test_what_is_replaced_is_named_until_it_is_back(monkeypatch, name):
    """`events` is a method that the class `profile` inherits, and that a backend hides."""
    with monkeypatch.context() as patch:
        patch.setattr(PLACES[name], name.rpartition(".")[2], lambda *given: 0)
        assert clock.replaced() == (name,)
    assert clock.replaced() == ()


def test_what_measures_does_not_see_a_clock_that_was_replaced(monkeypatch):
    for name in ("perf_counter", "perf_counter_ns"):
        monkeypatch.setattr(time, name, lambda: -1)
    assert clock.perf_counter() > 0
    assert clock.perf_counter_ns() > 0
