"""Choose which nodes of a cluster take which ranks of a worker."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A node of a cluster. `num_slots` is how many ranks it takes: its GPUs, or its CPUs if `kind` is None.

    `kind` is the kind of its GPUs. `id` is the cluster's own name of the node, and `name` is the name for people.
    """

    id: str
    name: str
    num_slots: int
    kind: str | None = None


@dataclass(frozen=True)
class Seats:
    """Nodes that run a worker together: `num_ranks` ranks on each, which take `num_slots` slots of each.

    `number` tells several workers of the same nodes apart. There are `at_once` of them.
    """

    nodes: tuple[Node, ...]
    num_ranks: int
    num_slots: int
    number: int = 0
    at_once: int = 1


def seats(nodes: Sequence[Node], num_ranks: int, *, may_crowd: bool = True) -> list[Seats]:
    """Return where the workers of `num_ranks` ranks each can run side by side.

    A node takes all ranks of a worker if it has the slots. On GPUs, a node takes as many workers as fit. On a CPU it
    takes one worker, so that the workers do not slow each other. If no node has the slots, the fewest nodes of one kind
    that have them share the ranks equally. If there are not enough and `may_crowd` is true, the largest node takes all
    ranks, and its worker reports that it has too few GPUs.
    """
    whole = [one for node in nodes if node.num_slots >= num_ranks for one in _on(node, num_ranks)]
    if whole:
        return whole
    for num_nodes in range(2, len(nodes) + 1):
        share = num_ranks // num_nodes
        fitting = [node for node in nodes if node.num_slots >= share]
        found = [] if num_ranks % num_nodes else list(_over(fitting, num_nodes, share))
        if found:
            return found
    largest = max(nodes, key=lambda node: node.num_slots, default=None)
    return [] if largest is None or not may_crowd else [Seats((largest,), num_ranks, largest.num_slots)]


def _on(node: Node, num_ranks: int) -> Iterator[Seats]:
    if node.kind is None:
        yield Seats((node,), num_ranks, node.num_slots)
        return
    at_once = node.num_slots // num_ranks
    for number in range(at_once):
        yield Seats((node,), num_ranks, num_ranks, number, at_once)


def _over(nodes: Iterable[Node], num_nodes: int, share: int) -> Iterator[Seats]:
    in_order = sorted(nodes, key=lambda node: (node.kind or "", node.name, node.id))
    for _, alike in itertools.groupby(in_order, key=lambda node: node.kind):
        some = list(alike)
        for first in range(0, len(some) // num_nodes * num_nodes, num_nodes):
            together = tuple(some[first : first + num_nodes])
            yield from _shared(together, share)


def _shared(nodes: tuple[Node, ...], share: int) -> Iterator[Seats]:
    if nodes[0].kind is None:
        yield Seats(nodes, share, min(node.num_slots for node in nodes))
        return
    at_once = min(node.num_slots for node in nodes) // share
    for number in range(at_once):
        yield Seats(nodes, share, share, number, at_once)
