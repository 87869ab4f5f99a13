"""Connect the supervisor with programs on the nodes of a cluster: messages of JSON over TCP, by a secret key.

A program that connects has a name, its seat, that the supervisor gave it. Both ends prove that they have the key. A
message is one JSON object. Bytes in a message are text, one character per byte.
"""

import json
import secrets
import socket
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

Message = dict[str, Any]
#: TCP gives up a connection whose other end does not answer for this time, for example because its machine is off.
SILENT_AFTER_S = 20
#: The supervisor takes at most this many messages of a program at once, so that none keeps it from the others.
MOST_MESSAGES = 100
#: A text of bytes, one character per byte.
BYTES = "latin-1"


def send(connection: Connection, message: Message) -> None:
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> Message:
    """Wait for the next message. Raises EOFError if the other end has closed the connection."""
    message: Message = json.loads(connection.recv_bytes())
    return message


def connect(address: str, key: bytes, hello: Message) -> Connection:
    """Connect to a supervisor's switchboard at `address`, which is HOST:PORT. Raises OSError if it is not there."""
    host, _, port = address.rpartition(":")
    connection = Client((host, int(port)), authkey=key)
    _notice_silence(connection)
    send(connection, hello)
    return connection


def _notice_silence(connection: Connection) -> None:
    with socket.socket(fileno=connection.fileno()) as tcp:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", SILENT_AFTER_S // 2),
            ("TCP_KEEPINTVL", 2),
            ("TCP_KEEPCNT", 5),
            ("TCP_USER_TIMEOUT", SILENT_AFTER_S * 1000),
        ):
            if hasattr(socket, name):
                tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        tcp.detach()


def own_address(connection: Connection) -> str:
    """Return the address of this machine as the other end of the connection sees it."""
    with socket.socket(fileno=connection.fileno()) as tcp:
        address: str = tcp.getsockname()[0]
        tcp.detach()
    return address


def free_port() -> int:
    """Return a port that no program of this machine listens on."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
    return port


class Link:
    """The supervisor's end of a connection. `hello` is the first message of the other end.

    `lost` says why the other end cannot be reached any more; it is empty as long as it can.
    """

    def __init__(self, connection: Connection, hello: Message) -> None:
        self._connection, self.hello = connection, hello
        self.lost = ""

    def send(self, **message: Any) -> None:
        try:
            if not self.lost:
                send(self._connection, message)
        except OSError as error:
            self._lose(error)

    def hear(self, within_s: float = 0.0) -> list[Message]:
        """Return the messages that have come, or the first MOST_MESSAGES. Wait at most `within_s` for the first."""
        messages: list[Message] = []
        try:
            while (
                not self.lost and len(messages) < MOST_MESSAGES and self._connection.poll(0.0 if messages else within_s)
            ):
                messages.append(receive(self._connection))
        except (OSError, EOFError, ValueError) as error:
            self._lose(error)
        return messages

    def _lose(self, error: Exception) -> None:
        self.lost = f"its connection ended ({str(error) or type(error).__name__})"
        self.close()

    def close(self) -> None:
        self.lost = self.lost or "its connection was closed"
        self._connection.close()


class Switchboard:
    """Listens for programs that have the key, and keeps each connection until somebody asks for its seat."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(32)
        self._server = socket.create_server(("", 0), backlog=128)
        self.port: int = self._server.getsockname()[1]
        self._arrived: dict[str, Link] = {}
        self._is_closed = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                tcp, _ = self._server.accept()
            except OSError:  # closed
                return
            # in a thread of its own, because a stranger may connect and say nothing
            threading.Thread(target=self._welcome, args=(Connection(tcp.detach()),), daemon=True).start()

    def _welcome(self, connection: Connection) -> None:
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            _notice_silence(connection)
            hello = receive(connection)
            self._arrived[str(hello["seat"])] = link = Link(connection, hello)
        except Exception:  # a stranger without the key
            connection.close()
            return
        if self._is_closed:  # in the meantime
            link.close()

    def arrived(self, seat: str, within_s: float = 0.0) -> Link | None:
        """Return the connection of the program in this seat; None if it has not connected yet."""
        deadline = time.monotonic() + within_s
        while (found := self._arrived.pop(seat, None)) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    def close(self) -> None:
        self._is_closed = True
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._server.close()
        for link in list(self._arrived.values()):
            link.close()
