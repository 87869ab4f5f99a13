"""Define what the supervisor needs of the processes of one worker, and of the places where it may start them.

There are two implementations. `local` starts the processes on this machine. `remote` speaks with `host`, a program that
starts the processes on a node of a cluster in the same way and passes on what they write.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from moebench.measure.protocol import Source
from moebench.run.processes import unused_name


@dataclass(frozen=True)
class Work:
    """What the processes of one worker need at their start.

    `program` is the Python that runs them, and `head` is the first line of their file of jobs. `variables` are
    environment variables that they get beside those of their machine.
    """

    program: str
    head: str
    num_ranks: int
    token: str
    device: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """The three files of a worker: what it prints, its jobs and its events."""

    log: Path
    jobs: Path
    events: Path

    @classmethod
    def named(cls, name: str, folder: Path) -> "Files":
        return cls(*(folder / f"{name}{end}" for end in (".log", ".jobs.jsonl", ".events.jsonl")))

    @classmethod
    def unused(cls, logs: Path) -> "Files":
        """Return the files of a new worker in the folder of logs, which is made if it is not there."""
        logs.mkdir(parents=True, exist_ok=True)
        return cls.named(unused_name(logs), logs)


class Group(Protocol):
    """The processes of one worker.

    `sources` are its files of events, one for each machine. `lost` says why the processes cannot be reached any more;
    it is empty as long as they can.
    """

    @property
    def sources(self) -> Sequence[Source]: ...

    @property
    def lost(self) -> str: ...

    def write_jobs(self, lines: Iterable[str]) -> None:
        """Add lines to the file of jobs."""

    def code(self) -> int | None:
        """Return the exit code of the worker's process, negative for a signal; None while the process runs.

        What the process wrote before it ended can then be read.
        """

    def follow_ranks(self) -> None:
        """From now on, notice if a rank ends before the others. All ranks have begun."""

    def died_elsewhere(self, source: int) -> bool:
        """Whether processes on another machine than that of this source have died."""

    def a_rank_has_left(self) -> bool:
        """Whether a rank has ended as if all were well, although the others go on."""

    def kernel_kills(self) -> int:
        """Return how many processes the kernel of the worker's machine has killed for lack of memory."""

    def tail(self) -> str:
        """Return the last lines that the processes printed."""

    def kill(self) -> None:
        """Kill all processes, and those that they started, and wait until they have ended."""

    def close(self) -> None:
        """Close the files."""


class Place(Protocol):
    """A place that takes one worker at a time. `name` is for messages. `node` is the node's name in a row of results.

    `lost` says why the place cannot be used any more; it is empty as long as it can.
    """

    @property
    def name(self) -> str: ...

    @property
    def node(self) -> str | None: ...

    @property
    def lost(self) -> str: ...

    def is_ready(self) -> bool:
        """Whether a worker can be started here now."""

    def start(self, work: Work, files: Files) -> Group:
        """Start a worker. The files are the supervisor's."""


class Site(Protocol):
    """Where the workers of a run may run: this machine, or a cluster, whose places change.

    On a cluster, machines may differ, so a case that was begun in one environment is finished in the same environment.
    """

    @property
    def is_cluster(self) -> bool: ...

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of places that the run could not use."""

    def places(self, num_ranks: int) -> Mapping[int, Place]:
        """Return the places that can take workers of `num_ranks` ranks, by number. No number comes back."""

    def give_up(self, number: int) -> None:
        """Never use the place again, because no worker starts there."""
