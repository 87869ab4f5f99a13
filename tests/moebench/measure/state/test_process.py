"""What a backend leaves changed in its process is named, and nothing else is."""

import builtins
import gc
import os
import signal
import sys
import threading
import time

import torch

from moebench.measure.state import process
from moebench.measure.state.process import State, is_busy


def test_a_process_in_which_nothing_happens_has_no_changes():
    state = State()
    torch.ones(300, 300) @ torch.ones(300, 300)
    assert state.changes() == ()


def test_each_change_is_named(monkeypatch, tmp_path):
    state = State()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_STACKSIZE", "1M")
    monkeypatch.setenv("NCCL_DEBUG_OF_A_LIBRARY", "1")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(builtins, "sorted", lambda *given: list(*given))
    monkeypatch.setattr(torch.Tensor, "sum", lambda *given: 0)
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    umask, limit = os.umask(0o012), sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 1)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        changes = state.changes()
    finally:
        signal.signal(signal.SIGUSR1, handler)
        os.umask(umask)
        sys.setrecursionlimit(limit)
        gc.set_threshold(*threshold)
    assert changes == (
        "working folder",
        "signal handlers",
        "umask",
        "interpreter",
        "sys.path",
        "environment (OMP_STACKSIZE)",
        "functions (builtins.sorted, time.sleep, torch.Tensor.sum)",
    )


def test_a_variable_that_is_gone_is_named(monkeypatch):
    monkeypatch.setenv("NCCL_OF_A_LIBRARY", "1")
    state = State()
    monkeypatch.delenv("NCCL_OF_A_LIBRARY")
    assert state.changes() == ("environment (NCCL_OF_A_LIBRARY)",)


def test_descriptors_that_lead_elsewhere_or_are_many_are_named(monkeypatch):
    kept = os.open(os.devnull, os.O_RDONLY)
    state = State()
    read, write = os.pipe()
    assert state.changes() == (), "a few new descriptors are no change"
    os.dup2(read, kept)
    assert state.changes() == ("descriptors (one that was open is closed, or leads elsewhere)",)
    monkeypatch.setattr(process, "KEPT_DESCRIPTORS", 1)
    assert state.changes() == ("descriptors (2 more are open)",)
    monkeypatch.setattr(process, "_descriptors", lambda: None)
    assert state.changes()[0] == "descriptors (none is free)"
    for number in (kept, read, write):
        os.close(number)


def test_a_thread_that_computes_is_seen_and_one_that_waits_is_not():
    stop = threading.Event()
    waiting = threading.Thread(target=stop.wait)
    waiting.start()
    assert not is_busy()

    def spin():
        while not stop.is_set():
            pass

    spinning = threading.Thread(target=spin)
    spinning.start()
    try:
        assert is_busy()
    finally:
        stop.set()
        spinning.join()
        waiting.join()
