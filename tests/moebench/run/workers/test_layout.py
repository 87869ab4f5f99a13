"""Ranks go to one node if it has the slots, else to the fewest nodes of one kind that share them equally."""

import pytest

from moebench.run.workers.layout import Node, Seats, seats


def gpus(name, count, kind="H200"):
    return Node(name, name, count, kind)


def cpus(name, count):
    return Node(name, name, count)


def names(found):
    return [("".join(node.name for node in one.nodes), one.num_ranks, one.num_slots) for one in found]


def test_a_node_takes_as_many_workers_as_its_gpus_hold():
    found = seats([gpus("a", 8), gpus("b", 3), gpus("c", 1)], 2)
    assert names(found) == [("a", 2, 2)] * 4 + [("b", 2, 2)]
    assert [one.number for one in found] == [0, 1, 2, 3, 0]
    assert [one.at_once for one in found] == [4, 4, 4, 4, 1]


def test_a_cpu_has_one_worker_at_a_time():
    assert names(seats([cpus("a", 8), cpus("b", 2)], 1)) == [("a", 1, 8), ("b", 1, 2)]


@pytest.mark.parametrize(
    ("num_ranks", "expected"),
    [
        (16, [("ab", 8, 8), ("cd", 8, 8)]),
        (32, [("abcd", 8, 8)]),
        (24, [("abc", 8, 8)]),
        (12, [("ab", 6, 6), ("cd", 6, 6)]),
    ],
)
def test_ranks_that_no_node_holds_go_to_the_fewest_nodes(num_ranks, expected):
    assert names(seats([gpus(name, 8) for name in "dcba"], num_ranks)) == expected


def test_a_group_has_gpus_of_one_kind():
    nodes = [gpus("a", 8), gpus("b", 8, "H100"), gpus("c", 8), gpus("d", 8, "H100"), gpus("e", 8, "A100")]
    assert names(seats(nodes, 16)) == [("bd", 8, 8), ("ac", 8, 8)]
    assert names(seats([gpus("a", 8), gpus("b", 8, "H100")], 16)) == [("a", 16, 8)], "no two of a kind: too few"


def test_ranks_of_cpus_take_whole_nodes():
    assert names(seats([cpus("a", 2), cpus("b", 3)], 4)) == [("ab", 2, 2)]


def test_where_no_nodes_hold_the_ranks_the_largest_takes_them_or_nobody():
    nodes = [gpus("a", 2), gpus("b", 4)]
    assert seats(nodes, 16) == [Seats((nodes[1],), num_ranks=16, num_slots=4)]
    assert seats(nodes, 16, may_crowd=False) == []
    assert seats([], 1) == []
