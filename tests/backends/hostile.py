"""Provide backends that compute the right result, and do one thing each to what other backends and moebench need.

`KINDS` maps the name of each to how its job must end: the status, and words of `detail` or of a flag. A backend acts
when it is built.
"""

import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from experts import GroupedExperts, MoEConfig


def _events() -> Path:
    return Path(sys.argv[sys.argv.index("--events") + 1])


def _journal() -> Path:
    return _events().parents[1] / "journal.jsonl"


class _Hostile(GroupedExperts):
    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.act()

    def act(self) -> None:
        raise NotImplementedError


class UsesUpDescriptors(_Hostile):
    kept: ClassVar[list[int]] = []

    def act(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            while True:
                self.kept.append(os.dup(0))
        except OSError:
            return


class ChangesFolder(_Hostile):
    def act(self) -> None:
        os.chdir("/")


class DeletesEvents(_Hostile):
    def act(self) -> None:
        _events().unlink()


class CutsEvents(_Hostile):
    def act(self) -> None:
        os.truncate(_events(), 0)


class ForgesEvents(_Hostile):
    def act(self) -> None:
        with _events().open("a") as file:
            file.write('{"kind": "record", "number": 0, "record": {"status": "ok"}}\n')


class GarblesEvents(_Hostile):
    def act(self) -> None:
        with _events().open("ab") as file:
            file.write(b"\xff\x00[[[[\n" * 100)


class DeletesItsLog(_Hostile):
    def act(self) -> None:
        _events().with_name(_events().name.replace(".events.jsonl", ".log")).unlink()
        os._exit(9)


class DeletesTheJournal(_Hostile):
    def act(self) -> None:
        _journal().unlink(missing_ok=True)


class ReplacesTheJournal(_Hostile):
    """Puts a FIFO in the journal's place. Whoever opened it would wait for ever."""

    def act(self) -> None:
        _journal().unlink(missing_ok=True)
        os.mkfifo(_journal())


class ForgesTheJournal(_Hostile):
    def act(self) -> None:
        _journal().write_bytes(b"{}\n")


class RemovesTheFolder(_Hostile):
    def act(self) -> None:
        import shutil

        shutil.rmtree(_journal().parent)


class Spins(_Hostile):
    def act(self) -> None:
        def spin() -> None:
            while True:
                pass

        threading.Thread(target=spin, daemon=True).start()


class LeavesASpinner(_Hostile):
    """Leaves a process that computes, in a session of its own."""

    def act(self) -> None:
        subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)


class FlushesDenormals(_Hostile):
    def act(self) -> None:
        torch.set_flush_denormal(True)


class TurnsMkldnnOff(_Hostile):
    def act(self) -> None:
        torch.backends.mkldnn.set_flags(False)


class PatchesTheClock(_Hostile):
    def act(self) -> None:
        now = time.perf_counter
        time.perf_counter = lambda: now() / 2


class RaisesMuch(_Hostile):
    def act(self) -> None:
        raise RuntimeError("much " * 4_000_000 + "\ud800\0")


class RaisesEmptyMemoryError(_Hostile):
    def act(self) -> None:
        raise MemoryError("\n")


class _Refuses(GroupedExperts):
    reason = ""

    def forward(self, *given: Tensor) -> Tensor:
        raise AssertionError("it is unsupported")


class SaysNothing(_Refuses):
    @staticmethod
    def unsupported(device: torch.device, config: MoEConfig | None) -> str:
        return ""


class SaysASurrogate(_Refuses):
    @staticmethod
    def unsupported(device: torch.device, config: MoEConfig | None) -> str:
        return "no \ud800 here\0"


KINDS: dict[str, tuple[str, str]] = {
    "UsesUpDescriptors": ("", "changed_process"),
    "ChangesFolder": ("ok", "the backend left changed: working folder"),
    "DeletesEvents": ("crash", "the file of its events was deleted"),
    "CutsEvents": ("crash", "the file of its events"),
    "ForgesEvents": ("crash", "a line that the worker did not write"),
    "GarblesEvents": ("crash", "a line that the worker did not write"),
    "DeletesItsLog": ("crash", "its process exited with 9"),
    "DeletesTheJournal": ("ok", ""),
    "ReplacesTheJournal": ("ok", ""),
    "ForgesTheJournal": ("ok", ""),
    "RemovesTheFolder": ("crash", "the file of its events was deleted"),
    "Spins": ("ok", "threads (some still compute)"),
    "LeavesASpinner": ("ok", "threads (some still compute)"),
    "FlushesDenormals": ("ok", "denormal numbers"),
    "TurnsMkldnnOff": ("ok", "mkldnn"),
    "PatchesTheClock": ("mismatch", "time.perf_counter"),
    "RaisesMuch": ("error", "characters left out"),
    "RaisesEmptyMemoryError": ("oom", "MemoryError"),
    "SaysNothing": ("unsupported", "the backend gives no reason"),
    "SaysASurrogate": ("unsupported", r"no \ud800 here\0"),
}
