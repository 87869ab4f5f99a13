"""Start hosts on the nodes of a Ray cluster. moebench.run.workers.ray_side does it, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moebench.errors import Refused, RunnerError, UsageError
from moebench.run.processes import tail
from moebench.run.workers.cluster import Cluster
from moebench.run.workers.host import KEY
from moebench.run.workers.layout import Node, Seats
from moebench.run.workers.link import Link, Message, Switchboard

#: Ray takes seconds to connect with a cluster.
CONNECT_TIMEOUT_S = 120.0


def check_ray() -> None:
    """Raise UsageError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray: Ray is not installed; install it with pip install 'moebench[ray]'")


def ray_cluster(address: str, device: str | None, logs: Path) -> Cluster:
    """Return the places of a Ray cluster. `address` is HOST:PORT, or `auto` for the cluster of this machine.

    Raises UsageError if Ray is not installed. Raises Refused if the cluster cannot be reached, or has no node for the
    device.
    """
    check_ray()
    switchboard = Switchboard()
    try:
        return Cluster(_Ray(address, device, logs, switchboard), switchboard)
    except BaseException:
        switchboard.close()
        raise


class _Ray:
    def __init__(self, address: str, device: str | None, logs: Path, switchboard: Switchboard) -> None:
        self._address, self._device = address, device
        self._nodes: list[Message] = []
        self._over: dict[str, str] = {}
        self._gone = ""  # why the cluster is not there any more
        logs.mkdir(parents=True, exist_ok=True)
        self._log = (logs / "ray.log").open("ab+")
        command = [sys.executable, "-m", "moebench.run.workers.ray_side"]
        self._process = subprocess.Popen(
            [*command, "--supervisor", str(switchboard.port), "--ray", address],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches only the supervisor
            env={**os.environ, KEY: switchboard.key.hex()},
        )
        try:
            self._link = self._connected(switchboard)
            self._first_nodes()
        except BaseException:
            self._end_process()
            raise

    def _connected(self, switchboard: Switchboard) -> Link:
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            link = switchboard.arrived("ray", within_s=0.2)
            if link is not None:
                return link
        raise Refused(
            f"--ray {self._address}: the process that speaks with Ray does not start", tail(self._log.fileno())
        )

    def _first_nodes(self) -> None:
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while not self._nodes:
            if time.monotonic() > deadline:
                raise Refused(f"--ray {self._address}: the cluster does not answer within {CONNECT_TIMEOUT_S:g} s")
            self._hear(0.2)
            if self._gone:
                raise Refused(
                    f"--ray {self._address}: {self._gone}; give the address of a running cluster's head, or start one "
                    "with `ray start --head`"
                )
        if not self._usable():
            raise Refused(
                f"--ray {self._address}: no node of the cluster has a GPU; leave --device cuda out, or add one"
            )

    def _hear(self, within_s: float = 0.0) -> None:
        for message in self._link.hear(within_s):
            match message["tell"]:
                case "nodes":
                    self._nodes = message["nodes"]
                case "over":
                    self._over[message["name"]] = message["why"]
                case "gone":
                    self._gone = message["why"].rstrip(".")
        if self._link.lost and not self._gone:
            self._gone = f"the process that speaks with Ray has ended; log: {self._log.name}"

    def _usable(self) -> list[Node]:
        """Return the nodes with GPUs; if there are none and the run may use CPUs, all nodes with a CPU."""
        on_gpu = [
            Node(one["id"], one["name"], one["num_gpus"], one["kind"] or "GPU")
            for one in self._nodes
            if one["num_gpus"]
        ]
        if self._device == "cuda" or (self._device is None and on_gpu):
            return on_gpu
        return [Node(one["id"], one["name"], one["num_cpus"]) for one in self._nodes if one["num_cpus"]]

    def nodes(self) -> Sequence[Node]:
        self._hear()
        if self._gone:
            raise RunnerError(
                f"the Ray cluster {self._address} cannot be reached: {self._gone}; "
                "--resume goes on, with this cluster or another"
            )
        return self._usable()

    def open(self, name: str, asked: Seats) -> None:
        nodes = [[node.id, node.name] for node in asked.nodes]
        on_gpu = asked.nodes[0].kind is not None
        self._link.send(do="open", name=name, nodes=nodes, num_slots=asked.num_slots, on_gpu=on_gpu)

    def over(self, name: str) -> str:
        return self._over.get(name, "")

    def close(self, name: str) -> None:
        self._link.send(do="close", name=name)

    def end(self) -> None:
        self._link.close()
        self._end_process()

    def _end_process(self) -> None:
        try:
            self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
