"""Speak with the processes of a worker on nodes of a cluster, through the hosts that started them there."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from moebench import __version__
from moebench.measure.protocol import TOKEN
from moebench.run.processes import KILL_TIMEOUT_S, tail
from moebench.run.workers.group import Files, Work
from moebench.run.workers.layout import Seats
from moebench.run.workers.link import BYTES, Link, Message
from moebench.run.workers.local import Meeting

#: After the first processes of a worker have died, the supervisor waits this long for the end of others: of the other
#: nodes, and of the node itself, which may be dying.
SETTLED_S = 2.0
#: A worker on another node gets the supervisor's environment variables with these names or beginnings of names.
PASSED_ON = ("PYTHONPATH", "OMP_NUM_THREADS", "EXPERTS_", "MOEBENCH_")
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)


class _Relayed:
    """A file of events on another machine. `keep` writes what came, for people who look for a fault."""

    def __init__(self, keep: Callable[[bytes], object]) -> None:
        self.fault, self._come, self._keep = "", b"", keep

    def add(self, events: bytes) -> None:
        self._keep(events)
        self._come += events

    def read(self) -> bytes:
        come, self._come = self._come, b""
        return come

    def close(self) -> None:
        pass


class _Part:
    """The processes of a worker on one node, as its host tells of them."""

    def __init__(self, link: Link, files: Files, number: int) -> None:
        self.link = link
        self._events = files.events.open("xb" if number == 0 else "ab", buffering=0)
        name = files.log if number == 0 else files.log.with_suffix(f".node{number}.log")
        self._log = name.open("ab+", buffering=0)
        self.source = _Relayed(self._events.write)
        self.code: int | None = None
        self.has_left, self.num_kills = False, 0
        self.is_killed = False

    def hear(self, within_s: float = 0.0) -> None:
        for message in self.link.hear(within_s):
            self._take(message)

    def _take(self, message: Message) -> None:
        match message["tell"]:
            case "look":
                self._log.write(message["log"].encode(BYTES))
                self.source.add(message["events"].encode(BYTES))
                self.source.fault = message["fault"]
                self.code, self.has_left, self.num_kills = message["code"], message["left"], message["kills"]
            case "killed":
                self.is_killed = True
            case "free":
                self.link.hello.update(message)

    def tail(self) -> str:
        return tail(self._log.fileno())

    def close(self) -> None:
        self._events.close()
        self._log.close()


class RemoteGroup:
    """The processes of one worker on one node, or on several nodes whose ranks find each other by a rendezvous."""

    def __init__(self, work: Work, files: Files, place: "RemotePlace") -> None:
        self._place = place
        self._jobs = files.jobs.open("x", encoding="utf-8")
        self._parts = [_Part(link, files, number) for number, link in enumerate(place.links)]
        self.sources = [part.source for part in self._parts]
        self._died_at: float | None = None
        self.is_closed = False
        here = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON) and name != TOKEN}
        seats = place.seats
        device = work.device or ("cpu" if seats.nodes[0].kind is None else "cuda")
        work = replace(work, num_ranks=seats.num_ranks, device=device, variables={**here, **work.variables})
        for part, meeting in zip(self._parts, self._meetings(work.token), strict=True):
            part.link.send(
                do="start",
                work=asdict(work),
                name=files.log.stem,
                at_once=seats.at_once,
                meeting=meeting and asdict(meeting),
                folder=str(Path.cwd()),
            )
        self._write([work.head])

    def _meetings(self, token: str) -> list[Meeting | None]:
        hellos = [part.link.hello for part in self._parts]
        ports = [hello.pop("port") for hello in hellos]  # each worker has other ports
        host, port = hellos[0]["address"], ports[0]
        if len(hellos) == 1:
            return [None]
        return [
            Meeting(len(hellos), host, port, here=number == 0, own=hello["address"], name=token[:16])
            for number, hello in enumerate(hellos)
        ]

    @property
    def lost(self) -> str:
        return self._place.lost

    def _write(self, lines: Iterable[str]) -> None:
        self._jobs.writelines(line + "\n" for line in lines)
        self._jobs.flush()

    def write_jobs(self, lines: Iterable[str]) -> None:
        lines = list(lines)
        self._write(lines)
        for part in self._parts:
            part.link.send(do="jobs", lines=lines)

    def code(self) -> int | None:
        for part in self._parts:
            part.hear()
        codes = [part.code for part in self._parts]
        dead = [code for code in codes if code is not None]
        if not dead or self.lost:
            return None
        self._died_at = self._died_at or time.monotonic()
        is_certain = None not in codes and not any(code in _KILLED for code in dead)
        if not is_certain and time.monotonic() - self._died_at < SETTLED_S:
            return None
        return self._first_dead().code

    def _first_dead(self) -> _Part:
        """Return the part that died; of several, one whose log tells of a signal: the others died of its death."""
        dead = [part for part in self._parts if part.code is not None] or self._parts
        return next((part for part in dead if (part.code or 0) < 0 or "Signal " in part.tail()), dead[0])

    def follow_ranks(self) -> None:
        for part in self._parts:
            part.link.send(do="follow")

    def died_elsewhere(self, source: int) -> bool:
        return any(part.code is not None for number, part in enumerate(self._parts) if number != source)

    def a_rank_has_left(self) -> bool:
        return all(part.code is None for part in self._parts) and any(part.has_left for part in self._parts)

    def kernel_kills(self) -> int:
        return sum(part.num_kills for part in self._parts)

    def tail(self) -> str:
        return self._first_dead().tail()

    def kill(self) -> None:
        for part in self._parts:
            if not part.is_killed:
                part.link.send(do="kill")
        deadline = time.monotonic() + 2 * KILL_TIMEOUT_S
        for part in self._parts:
            while not part.is_killed and not part.link.lost:
                part.hear(max(0.0, deadline - time.monotonic()))
                if time.monotonic() >= deadline:
                    part.link.close()

    def close(self) -> None:
        self.is_closed = True
        self._jobs.close()
        for part in self._parts:
            part.close()


class RemotePlace:
    """A place on nodes of a cluster: the connections with its hosts, once they have come."""

    def __init__(self, seats: Seats, find: Callable[[int], Link | None]) -> None:
        self.seats, self._find = seats, find
        self.links: Sequence[Link] = ()
        self._found: list[Link | None] = [None] * len(seats.nodes)
        self._group: RemoteGroup | None = None
        self._why_lost = ""
        self.node = ", ".join(node.name for node in seats.nodes)
        self.name = f"node {self.node}" if len(seats.nodes) == 1 else f"nodes {self.node}"

    def lose(self, why: str) -> None:
        """Say why the place cannot be used any more."""
        self._why_lost = self._why_lost or why

    @property
    def lost(self) -> str:
        return self._why_lost or next((link.lost for link in self.links if link.lost), "")

    @property
    def other_version(self) -> str:
        """Why the nodes do not have this moebench; empty if they have it, or have not told."""
        found = {str(link.hello["moebench"]) for link in self.links} - {__version__}
        return f"it has moebench {', '.join(sorted(found))}, and this is {__version__}" if found else ""

    def is_ready(self) -> bool:
        if not self.links:
            self._found = [link or self._find(number) for number, link in enumerate(self._found)]
            if None not in self._found:
                self.links = [link for link in self._found if link is not None]
        if self._group is not None and not self._group.is_closed:
            return False  # the group hears what its hosts say
        for link in self.links:
            for message in link.hear():
                link.hello.update(message)
        return bool(self.links) and not self.lost and all("port" in link.hello for link in self.links)

    def start(self, work: Work, files: Files) -> RemoteGroup:
        self._group = RemoteGroup(work, files, self)
        return self._group

    def close(self) -> None:
        for link in self._found:
            if link is not None:
                link.close()
