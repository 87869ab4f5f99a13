"""End a worker's processes, read the end of its log, and count the processes that the kernel killed."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from moebench.measure.protocol import TOKEN, told

#: A killed process that is still there after this time is stuck in its GPU's driver, and nobody can end it.
KILL_TIMEOUT_S = 30.0
#: The supervisor looks once per this many seconds whether all ranks of a group are still there.
RANKS_POLL_S = 2.0
LOG_LINES, TAIL_BYTES = 12, 1 << 16
#: The file in which the kernel counts the processes that it killed for lack of memory.
KERNEL_COUNTERS = Path("/proc/vmstat")


def kill_all(process: subprocess.Popen[bytes], token: str) -> None:
    """Kill a worker with all processes that it started, and wait until they have ended.

    The processes are the worker's process group, and every process that inherited the worker's token. A launcher's
    ranks have sessions of their own, and so may a process that a backend started.
    """
    with suppress(ProcessLookupError):  # the group outlives its leader where the leader left children
        os.killpg(process.pid, signal.SIGKILL)
    killed = []
    while found := [one for one in _with_token(token) if one not in killed]:  # one of them may have started another
        for one in found:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        killed += found
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILL_TIMEOUT_S)
    psutil.wait_procs([one for one in killed if one.pid != process.pid], timeout=KILL_TIMEOUT_S)


def _with_token(token: str) -> Iterator[psutil.Process]:
    for one in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # a process of another user, or one that has just ended
            if one.pid != os.getpid() and one.environ().get(TOKEN) == token and one.status() != psutil.STATUS_ZOMBIE:
                yield one


def tail(log: int) -> str:
    """Return the last lines of the log with this descriptor, at most TEXT_CHARS characters.

    Where Python died with a stack, return the first lines of the thread that died. The most recent call is the first in
    such a stack. Python prints other threads before the one that died.
    """
    size = os.fstat(log).st_size  # a backend may have printed for hours
    lines = os.pread(log, TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace").splitlines()
    deaths = [number for number, line in enumerate(lines) if line.startswith("Fatal Python error")]
    if not deaths:
        return told("\n".join(lines[-LOG_LINES:]))
    death, *stacks = lines[deaths[-1] :]
    dying = [number for number, line in enumerate(stacks) if line.startswith("Current thread")]
    return told("\n".join([death, *stacks[dying[0] if dying else 0 :]][:LOG_LINES]))


def kernel_kills() -> int:
    """Return how many processes the kernel has killed on this machine for lack of memory; 0 where it does not count."""
    try:
        counters = KERNEL_COUNTERS.read_bytes()
    except FileNotFoundError:
        return 0
    found = re.search(rb"^oom_kill (\d+)$", counters, re.MULTILINE)
    return int(found[1]) if found else 0


class Ranks:
    """The processes of a group of ranks, as torch.distributed's launcher started them; none without a launcher."""

    def __init__(self, launcher: int | None = None, num_ranks: int = 0) -> None:
        self._processes: list[psutil.Process] = []
        self._num_ranks, self._looked, self._missed = num_ranks, time.monotonic(), False
        with suppress(psutil.NoSuchProcess):
            children = [] if launcher is None else psutil.Process(launcher).children()
            self._processes = [one for one in children if "moebench.measure.worker" in one.cmdline()]

    def have_left(self) -> bool:
        """Whether a rank has ended although its launcher goes on.

        The launcher ends soon after a rank that failed. A rank that left as if all were well is missed twice.
        """
        if not self._num_ranks or time.monotonic() - self._looked < RANKS_POLL_S:
            return False
        missed_before, self._looked = self._missed, time.monotonic()
        self._missed = sum(map(_is_there, self._processes)) < self._num_ranks
        return self._missed and missed_before


def _is_there(one: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(one.is_running() and one.status() != psutil.STATUS_ZOMBIE)
    return False


def unused_name(logs: Path) -> str:
    """Return a worker's name that has no files in the folder yet.

    The files of an earlier worker hold jobs and events that must not be read again. The number is above all others, so
    that the order of the names is the order of the workers.
    """
    with os.scandir(logs) as entries:
        found = [name for entry in entries if (name := re.match(r"worker-(\d+)\.", entry.name))]
    return f"worker-{max((int(name[1]) for name in found), default=-1) + 1}"
