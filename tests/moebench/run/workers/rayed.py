"""Start a Ray cluster of several node processes on this machine, and kill a node as if its machine had lost power."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from moebench.run.workers.link import free_port
from tests.moebench.executed import python_path

ROOT = Path(__file__).parents[4]
START_TIMEOUT_S = 120
#: Each node is a process `ray start --block` and its children.
OPTIONS = ("--block", "--include-log-monitor=false", "--disable-usage-stats", f"--object-store-memory={80 << 20}")


class RayCluster:
    """A head and further nodes, on free ports and in a temporary folder. `end` ends the processes that it started."""

    def __init__(self, cpus=1):
        # the paths of Ray's sockets must be short
        self.folder = Path(tempfile.mkdtemp(prefix="ray"))
        self.port, self.nodes, self.count = free_port(), {}, 0
        self.head = self._start("--head", f"--port={self.port}", cpus=cpus)
        self._until(lambda: self._head_answers(), "its head")

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def _start(self, *arguments, cpus):
        name = f"node-{self.count}"
        self.count += 1
        temporary = self.folder / str(self.count)  # a folder of its own: nodes that start at once would share sockets
        program = [sys.executable, "-m", "ray.scripts.scripts", "start", *OPTIONS]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.nodes[name] = subprocess.Popen(
                [*program, f"--num-cpus={cpus}", f"--node-name={name}", f"--temp-dir={temporary}", *arguments],
                env={**os.environ, "PYTHONPATH": python_path(ROOT), "RAY_worker_niceness": "0", "TMPDIR": self.folder},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return name

    def add(self, cpus=1, gpus=0):
        """Start a further node. Return its name; the node joins the cluster soon after.

        Ray counts and numbers the GPUs that it is told of, whether they exist or not.
        """
        return self._start(f"--address={self.address}", f"--num-gpus={gpus}", cpus=cpus)

    def _head_answers(self):
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            return True
        return False

    def _until(self, is_so, what):
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_so():
            logs = "".join(path.read_text() for path in self.folder.glob("node-*.log"))
            assert time.monotonic() < deadline, f"Ray does not start {what}: {logs}"
            time.sleep(0.02)

    def processes(self, name):
        """Return the processes of a node, those first that started the others."""
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.nodes[name].pid)
            return [first, *first.children(recursive=True)]
        return []

    def node_of(self, pid):
        """Return the name of the node that has the process; None if no node has it."""
        return next((name for name in self.nodes if pid in {one.pid for one in self.processes(name)}), None)

    def kill(self, name):
        """Kill all processes of a node at once: none of them can tell of another's death."""
        processes = self.processes(name)
        for act in ("suspend", "kill"):
            for one in processes:
                with suppress(psutil.NoSuchProcess):
                    getattr(one, act)()
        self.nodes.pop(name).wait()

    def end(self):
        for name in list(self.nodes):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)
