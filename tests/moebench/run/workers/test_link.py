"""A program with the key gets its seat; a stranger gets nothing and stops nobody; a closed end is told."""

import multiprocessing
import socket

import pytest

from moebench.run.workers.link import Switchboard, connect, free_port, own_address, receive, send

HELLO = {"seat": "a", "node": "n1"}


@pytest.fixture
def switchboard():
    found = Switchboard()
    yield found
    found.close()


def address(switchboard):
    return f"127.0.0.1:{switchboard.port}"


def test_messages_go_both_ways(switchboard):
    with connect(address(switchboard), switchboard.key, HELLO) as other:
        link = switchboard.arrived("a", within_s=30)
        assert switchboard.arrived("a") is None, "a seat is given once"
        assert link.hello == HELLO
        send(other, {"text": "ä\x00" * 100_000})
        send(other, {"number": 1})
        heard = []
        while len(heard) < 2:
            heard += link.hear(30)
        assert heard == [{"text": "ä\x00" * 100_000}, {"number": 1}]
        link.send(do="kill")
        assert receive(other) == {"do": "kill"}
        assert own_address(other) == "127.0.0.1"
    assert link.hear(30) == []
    assert link.lost.startswith("its connection ended")
    link.send(do="anything")  # nobody hears it, and nothing is raised
    assert link.hear() == []


def test_a_stranger_without_the_key_is_turned_away_and_stops_nobody(switchboard):
    with socket.create_connection(("127.0.0.1", switchboard.port)):  # says nothing
        with pytest.raises((multiprocessing.AuthenticationError, EOFError, ConnectionError)):
            connect(address(switchboard), b"guessed", HELLO)
        assert switchboard.arrived("a") is None
        with connect(address(switchboard), switchboard.key, HELLO):
            assert switchboard.arrived("a", within_s=30) is not None


def test_what_is_no_message_ends_the_connection(switchboard):
    with connect(address(switchboard), switchboard.key, HELLO) as other:
        link = switchboard.arrived("a", within_s=30)
        other.send_bytes(b"no JSON")
        assert link.hear(30) == []
        assert link.lost


def test_nobody_arrives_at_a_closed_switchboard():
    closed = Switchboard()
    closed.close()
    with pytest.raises(ConnectionRefusedError):
        connect(address(closed), closed.key, HELLO)


def test_a_free_port_can_be_used():
    with socket.create_server(("", free_port())):
        pass
