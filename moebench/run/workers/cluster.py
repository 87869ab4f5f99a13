"""Keep the places of a cluster: open them on nodes that come, give them up on nodes that go."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

from moebench.errors import RunnerError
from moebench.run.workers.layout import Node, Seats, seats
from moebench.run.workers.link import Switchboard
from moebench.run.workers.remote import RemotePlace


class Starter(Protocol):
    """Starts hosts on the nodes of a cluster: Ray or Slurm."""

    def nodes(self) -> Sequence[Node]:
        """Return the nodes that can take workers now. Raises RunnerError if the cluster is gone."""

    def open(self, name: str, asked: Seats) -> None:
        """Start a host on each node of `asked`, as soon as it has the slots free. Host i takes the seat NAME/i."""

    def over(self, name: str) -> str:
        """Return why a host of these seats has ended; empty as long as none has."""

    def close(self, name: str) -> None:
        """End the hosts of these seats."""

    def end(self) -> None:
        """End everything that was started."""


class Cluster:
    """The places of a cluster. The places change as nodes come and go."""

    is_cluster = True

    def __init__(self, starter: Starter, switchboard: Switchboard) -> None:
        self._starter, self._switchboard = starter, switchboard
        self._numbers = itertools.count()
        self._open: dict[int, RemotePlace] = {}
        self._ranks: dict[int, int] = {}  # the ranks of a place's workers
        self._unfit: set[Seats] = set()  # where no host starts
        self._held: set[int] = set()  # numbers of ranks that the cluster has had places for
        self.notes: list[str] = []

    def places(self, num_ranks: int) -> Mapping[int, RemotePlace]:
        """Return the places that can take workers of `num_ranks` ranks, by number. No number comes back.

        A place that is lost is not among them. Raises RunnerError if the cluster has no node, or is gone.
        """
        nodes = self._starter.nodes()
        for number, place in list(self._open.items()):
            self._look_at(number, place, nodes, num_ranks)
        together = {node for place in self._open.values() for node in place.seats.nodes if len(place.seats.nodes) > 1}
        rest = [node for node in nodes if node not in together]
        fitting = seats(rest, num_ranks, may_crowd=num_ranks not in self._held)
        wanted = [one for one in fitting if one not in self._unfit]
        if not wanted and not self._open:
            raise RunnerError(
                f"the cluster has no node left for jobs of {num_ranks} ranks; --resume goes on with another cluster",
                *self.notes[-1:],
            )
        self._held.add(num_ranks)
        taken = [place.seats for place in self._open.values()]
        for one in wanted:
            if one not in taken:
                self._open_at(one, num_ranks)
        return dict(self._open)

    def _look_at(self, number: int, place: RemotePlace, nodes: Sequence[Node], num_ranks: int) -> None:
        why = self._starter.over(str(number))
        if why:
            place.lose(why)
        if not set(place.seats.nodes) <= set(nodes):
            place.lose("it has left the cluster")
        if self._ranks[number] != num_ranks:
            place.lose("it is needed for other jobs")
        place.is_ready()  # asks who has come
        unfit = place.other_version or (f"no host starts there: {why}" if why and not place.links else "")
        if unfit:
            self._unfit.add(place.seats)
            self.notes.append(f"{place.name}: not used, because {unfit}")
        if unfit or place.lost:
            self._close(number)

    def _open_at(self, asked: Seats, num_ranks: int) -> None:
        number = next(self._numbers)
        self._ranks[number] = num_ranks
        self._open[number] = RemotePlace(
            asked,
            lambda rank, number=number: self._switchboard.arrived(f"{number}/{rank}"),  # type: ignore[misc]
        )
        self._starter.open(str(number), asked)

    def give_up(self, number: int) -> None:
        """Never use the place again, because no worker starts there."""
        if number in self._open:
            self._unfit.add(self._open[number].seats)
            self._close(number)

    def _close(self, number: int) -> None:
        self._open.pop(number).close()
        self._starter.close(str(number))

    def end(self) -> None:
        """End the hosts, and what started them."""
        for number in list(self._open):
            self._close(number)
        self._starter.end()
        self._switchboard.close()
