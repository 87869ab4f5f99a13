"""Speak with Ray in a process of its own: tell the supervisor which nodes there are, and start hosts on them.

    MOEBENCH_KEY=… python -m moebench.run.workers.ray_side --supervisor PORT --ray ADDRESS

Ray ends a process that loses the cluster's head. Then the supervisor must live on to tell what it has measured, so it
does not import Ray. This process tells `nodes`, `over` if a host has ended, and `gone` if the cluster is not there. The
supervisor says `open` and `close`.
"""

import argparse
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from moebench.run.workers.host import KEY, serve
from moebench.run.workers.link import Message, connect, receive, send

#: The supervisor hears of nodes that come and go within about this time.
LOOK_S = 0.5
#: A head that does not accept a connection within this time is gone.
HEAD_TIMEOUT_S = 10.0
#: A host ends within moments of the end of its connection. One that does not is killed after this time.
END_TIMEOUT_S = 5.0
NODE_ID = "ray.io/node-id"


class _Cluster:
    def __init__(self, connection: Connection, supervisor_port: int, key: bytes) -> None:
        import ray

        self._connection, self._key = connection, key
        context: Any = ray.get_runtime_context()
        self._head = _parsed(context.gcs_address)
        self._supervisor = f"{ray.util.get_node_ip_address()}:{supervisor_port}"
        self._groups: dict[str, Any] = {}  # name of seats -> placement group
        self._hosts: dict[Any, str] = {}  # a host's task -> name of its seats
        self._closing: dict[str, float] = {}  # name of seats -> when their hosts are killed
        self._nodes: list[Message] | None = None
        self._remote: Any = ray.remote(serve)
        self._lock = threading.Lock()
        threading.Thread(target=self._watch_head, daemon=True).start()

    def work(self) -> None:
        """Do what the supervisor says, until it ends or the cluster is gone."""
        while True:
            while self._connection.poll(LOOK_S):
                message = receive(self._connection)
                if message["do"] == "open":
                    self._start(message["name"], message["nodes"], message["num_slots"], message["on_gpu"])
                elif message["name"] in self._groups:
                    self._closing[message["name"]] = time.monotonic() + END_TIMEOUT_S
            self._tell()
            self._close()

    def _watch_head(self) -> None:
        """End this process when the head does not answer: a call of Ray, and its shutdown, would wait a minute."""
        while True:
            try:
                socket.create_connection(self._head, timeout=HEAD_TIMEOUT_S).close()
            except OSError as error:
                self._say(tell="gone", why=f"its head {self._head[0]}:{self._head[1]}: {error}")
                os._exit(1)
            time.sleep(LOOK_S)

    def _say(self, **message: Any) -> None:
        with self._lock:
            send(self._connection, message)

    def _tell(self) -> None:
        import ray

        nodes = [_described(node) for node in ray.nodes() if node["Alive"]]
        if nodes != self._nodes:
            self._nodes = nodes
            self._say(tell="nodes", nodes=nodes)
        ended, _ = ray.wait(list(self._hosts), num_returns=len(self._hosts), timeout=0) if self._hosts else ([], [])
        for task in ended:
            try:
                ray.get(task)
                why = "its host has ended"
            except Exception as error:  # of whatever kind: Ray passes on what the host raised
                why = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            self._say(tell="over", name=self._hosts.pop(task), why=why)

    def _start(self, name: str, nodes: list[list[str]], num_slots: int, on_gpu: bool) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = [{"GPU" if on_gpu else "CPU": float(num_slots)} for _ in nodes]
        strategy = "STRICT_PACK" if len(nodes) == 1 else "STRICT_SPREAD"
        on = [{NODE_ID: node_id} for node_id, _ in nodes]
        self._groups[name] = group = placement_group(bundles, strategy, bundle_label_selector=on)
        options = {"num_gpus": num_slots, "num_cpus": 0} if on_gpu else {"num_gpus": 0, "num_cpus": num_slots}
        for number, (_, node) in enumerate(nodes):
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
            host = self._remote.options(max_retries=0, scheduling_strategy=where, **options)
            self._hosts[host.remote(self._supervisor, self._key, f"{name}/{number}", node)] = name

    def _close(self) -> None:
        """Give back the resources of seats that are closed and whose hosts have ended, or should have ended."""
        from ray.util.placement_group import remove_placement_group

        for name, deadline in list(self._closing.items()):
            if name not in self._hosts.values() or time.monotonic() > deadline:
                self._hosts = {task: of for task, of in self._hosts.items() if of != name}
                remove_placement_group(self._groups.pop(name))  # Ray kills a host that has not ended
                del self._closing[name]

    def end(self) -> None:
        """Wait until the hosts have ended. What they hold, Ray takes back when this process ends."""
        import ray

        if self._hosts:
            ray.wait(list(self._hosts), num_returns=len(self._hosts), timeout=END_TIMEOUT_S)


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _described(node: dict[str, Any]) -> Message:
    """Return what the supervisor needs of a node, as `ray.nodes` describes it. A node may have a name of its own."""
    has = node["Resources"]
    name = node.get("NodeName")
    kinds = sorted(one.removeprefix("accelerator_type:") for one in has if one.startswith("accelerator_type:"))
    return {
        "id": node["NodeID"],
        "name": node["NodeManagerHostname"] if name in (None, "", node["NodeManagerAddress"]) else name,
        "num_gpus": int(has.get("GPU", 0)),
        "num_cpus": int(has.get("CPU", 0)),
        "kind": ", ".join(kinds),
    }


def main() -> None:
    """Run this as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supervisor", required=True, type=int, metavar="PORT")
    parser.add_argument("--ray", required=True, metavar="ADDRESS")
    options = parser.parse_args()
    key = bytes.fromhex(os.environ.pop(KEY))
    connection = connect(f"127.0.0.1:{options.supervisor}", key, {"seat": "ray"})
    try:
        import ray

        if options.ray != "auto":
            socket.create_connection(_parsed(options.ray), timeout=HEAD_TIMEOUT_S).close()  # Ray would try for minutes
        ray.init(address=options.ray, log_to_driver=False)
        cluster = _Cluster(connection, options.supervisor, key)
    except Exception as error:  # what Ray raises where there is no cluster, or one of another version
        send(connection, {"tell": "gone", "why": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        sys.exit(1)
    with suppress(EOFError, ConnectionError):  # the supervisor has ended
        cluster.work()
    cluster.end()


if __name__ == "__main__":
    main()
