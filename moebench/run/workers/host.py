"""Run on a node of a cluster: start the node's processes of a worker, and pass on to the supervisor what they write.

    MOEBENCH_KEY=… python -m moebench.run.workers.host --supervisor HOST:PORT --seat SEAT

The supervisor sends these messages, each with the key `do`: `start`, `jobs`, `follow`, `kill`. The host answers with
`look`, whenever the processes have written something or have ended, and with `killed`. It starts one worker after the
other. It ends, with all processes that it started, when its connection ends.
"""

import argparse
import os
import platform
import tempfile
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import moebench
from moebench.run.workers.group import Files, Work
from moebench.run.workers.link import BYTES, Message, connect, free_port, own_address, receive, send
from moebench.run.workers.local import LocalGroup, Meeting

POLL_S = 0.02
#: A host passes on at most this many bytes of a log at once. When the worker has ended, these are the last bytes.
MOST_LOG_BYTES = 1 << 17
#: The environment variable with the key, in hexadecimal. The processes of a worker do not inherit it.
KEY = "MOEBENCH_KEY"
#: What Ray sets for each of its own processes, and what must not reach a worker.
_NOT_INHERITED = ("OMP_NUM_THREADS", KEY)


def serve(address: str, key: bytes, seat: str, node: str) -> None:
    """Work for the supervisor at `address` until the connection ends."""
    hello = {"seat": seat, "node": node, "moebench": moebench.__version__}
    with (
        connect(address, key, hello) as connection,
        tempfile.TemporaryDirectory(prefix="moebench-", ignore_cleanup_errors=True) as folder,
    ):
        host = _Host(connection, Path(folder))
        try:
            with suppress(EOFError, ConnectionError, TimeoutError):  # the supervisor has ended
                host.work()
        finally:
            host.kill()


class _Host:
    """The processes that run on this node now, and what the supervisor knows of them."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        self._connection, self._folder = connection, folder
        self._group: LocalGroup | None = None
        self._log_bytes = 0
        self._told: Message = {}

    def work(self) -> None:
        """Do what the supervisor says. Raises EOFError or an OSError when the connection ends."""
        self._offer()
        while True:
            while self._connection.poll(POLL_S):
                self._do(receive(self._connection))
            self._look()

    def _offer(self) -> None:
        """Tell where the ranks of several nodes can meet: the address of this node, and a free port."""
        send(self._connection, {"tell": "free", "address": own_address(self._connection), "port": free_port()})

    def _do(self, message: Message) -> None:
        match message["do"]:
            case "start":
                self._start(message)
            case "jobs" if self._group is not None:
                self._group.write_jobs(message["lines"])
            case "follow" if self._group is not None:
                self._group.follow_ranks()
            case "kill":
                self.kill()
                send(self._connection, {"tell": "killed"})
                self._offer()

    def _start(self, message: Message) -> None:
        work, meeting, there = Work(**message["work"]), message["meeting"], Path(message["folder"])
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        self._log_bytes, self._told = 0, {}
        self._group = LocalGroup(
            replace(work, variables={}),
            Files.named(message["name"], self._folder),
            at_once=message["at_once"],
            inherited={**inherited, **work.variables},
            meeting=None if meeting is None else Meeting(**meeting),
            folder=there if there.is_dir() else self._folder,
        )

    def _look(self) -> None:
        """Tell what is new of the processes, if anything is."""
        group = self._group
        if group is None:
            return
        code = group.code()  # first, so that what a process wrote before it ended is read
        (source,) = group.sources
        events = source.read()
        log, self._log_bytes = group.printed(self._log_bytes, MOST_LOG_BYTES)
        state = {"code": code, "fault": source.fault, "left": group.a_rank_has_left(), "kills": group.kernel_kills()}
        if events or log or state != self._told:
            self._told = state
            new = {"events": events.decode(BYTES), "log": log.decode(BYTES)}
            send(self._connection, {"tell": "look", **new, **state})

    def kill(self) -> None:
        """Kill the processes, and remove their files."""
        if self._group is not None:
            self._group.kill()
            self._group.close()
            self._group = None
        for path in self._folder.glob("worker-*"):
            path.unlink()


def main() -> None:
    """Run the host as a program of its own, for example as a task of Slurm's `srun`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supervisor", required=True, metavar="HOST:PORT")
    parser.add_argument("--seat", required=True)
    options = parser.parse_args()
    node = os.environ.get("SLURMD_NODENAME", platform.node())
    seat = f"{options.seat}/{os.environ.get('SLURM_NODEID', '0')}"
    serve(options.supervisor, bytes.fromhex(os.environ[KEY]), seat, node)


if __name__ == "__main__":
    main()
