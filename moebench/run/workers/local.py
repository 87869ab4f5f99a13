"""Start the processes of a worker on this machine."""

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moebench.machine import gpus
from moebench.machine.environment import cpu_cores_usable
from moebench.measure.protocol import TOKEN, EventFile
from moebench.run.processes import Ranks, kernel_kills, kill_all, tail
from moebench.run.workers.group import Files, Work


@dataclass(frozen=True)
class Meeting:
    """How the ranks of several nodes find each other: torch.distributed's rendezvous `c10d`.

    `host` is the node with the store, and `own` is this node, both as addresses. `here` says whether they are the same
    node. `name` is the same on all nodes of the group, and no other group has it.
    """

    num_nodes: int
    host: str
    port: int
    here: bool
    own: str
    name: str

    @property
    def arguments(self) -> list[str]:
        """The arguments of torch.distributed's launcher on this node."""
        endpoint = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return [
            f"--nnodes={self.num_nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}",
            f"--rdzv-id={self.name}",
            f"--rdzv-conf=is_host={str(self.here).lower()}",
            f"--local-addr={self.own}",
        ]


class LocalGroup:
    """The processes of one worker on this machine: one process, or torch.distributed's launcher and its ranks.

    `inherited` are the environment variables that the processes start with. With a `meeting`, the ranks of `work` are
    those of this node only, and form one group with the ranks of other nodes.
    """

    lost = ""

    def __init__(
        self,
        work: Work,
        files: Files,
        place: gpus.Place = gpus.ANYWHERE,
        at_once: int = 1,
        *,
        inherited: Mapping[str, str] = os.environ,
        meeting: Meeting | None = None,
        folder: Path | None = None,
    ) -> None:
        self._work, self._ranks, self._has_launcher = work, Ranks(), work.num_ranks > 1 or meeting is not None
        self._jobs = files.jobs.open("x", encoding="utf-8")
        self._log = files.log.open("ab+")
        self.sources = (EventFile(files.events),)
        self.write_jobs([work.head])
        own = gpus.variables(place, at_once, work.num_ranks, cpu_cores_usable(), inherited)
        # in its own session, so that Ctrl-C reaches only the supervisor, and a hung group can be killed as a whole
        self.process = subprocess.Popen(
            self._command(files, meeting),
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**inherited, **own, **work.variables, TOKEN: work.token},
            cwd=folder,
        )

    def _command(self, files: Files, meeting: Meeting | None) -> list[str]:
        """Return the command that starts the worker's module in Python, or several ranks through torch's launcher."""
        command = [self._work.program]
        if self._has_launcher:
            how = ["--standalone"] if meeting is None else meeting.arguments
            command += ["-m", "torch.distributed.run", *how, f"--nproc-per-node={self._work.num_ranks}"]
        command += ["-m", "moebench.measure.worker", "--jobs", str(files.jobs), "--events", str(files.events)]
        return command + (["--device", self._work.device] if self._work.device else [])

    def write_jobs(self, lines: Iterable[str]) -> None:
        self._jobs.writelines(line + "\n" for line in lines)
        self._jobs.flush()

    def code(self) -> int | None:
        return self.process.poll()

    def follow_ranks(self) -> None:
        if self._has_launcher:
            self._ranks = Ranks(self.process.pid, self._work.num_ranks)

    def died_elsewhere(self, source: int) -> bool:
        return False

    def a_rank_has_left(self) -> bool:
        return self._ranks.have_left()

    def kernel_kills(self) -> int:
        return kernel_kills()

    def tail(self) -> str:
        return tail(self._log.fileno())

    def printed(self, since: int, most: int) -> tuple[bytes, int]:
        """Return what the processes printed from the byte `since` on, at most `most` bytes, and the byte after it.

        If the processes have ended, return the last bytes.
        """
        log = self._log.fileno()
        if self.process.returncode is not None:
            since = max(since, os.fstat(log).st_size - most)
        found = os.pread(log, most, since)
        return found, since + len(found)

    def kill(self) -> None:
        kill_all(self.process, self._work.token)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        for file in (*self.sources, self._jobs, self._log):
            file.close()


@dataclass(frozen=True)
class LocalPlace:
    """Some of this machine's GPUs, or its CPU. `at_once` workers run side by side on the machine."""

    slots: gpus.Place
    at_once: int = 1
    node = None
    lost = ""

    @property
    def name(self) -> str:
        return ", ".join(slot.gpu for slot in self.slots if slot.gpu is not None) or "a slot"

    def is_ready(self) -> bool:
        return True

    def start(self, work: Work, files: Files) -> LocalGroup:
        return LocalGroup(work, files, self.slots, self.at_once)


class Here:
    """The places of this machine, which stay the same."""

    is_cluster = False
    notes = ()

    def __init__(self, slots: Sequence[gpus.Slot]) -> None:
        self._slots = slots

    def places(self, num_ranks: int) -> Mapping[int, LocalPlace]:
        """Return the places that can take workers of `num_ranks` ranks, by number."""
        found = gpus.places(self._slots, num_ranks)
        return {number: LocalPlace(slots, len(found)) for number, slots in enumerate(found)}

    def give_up(self, number: int) -> None:
        """Nothing has to end: the caller remembers that it gave up the place."""
