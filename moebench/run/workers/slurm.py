"""Start hosts on the nodes of a Slurm job: each place is a job step, which `srun` starts."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from moebench.errors import UsageError
from moebench.run.processes import tail
from moebench.run.workers.cluster import Cluster
from moebench.run.workers.host import KEY
from moebench.run.workers.layout import Node, Seats
from moebench.run.workers.link import Switchboard

END_TIMEOUT_S = 20.0


def slurm_nodes(device: str | None, variables: Mapping[str, str] = os.environ) -> tuple[Node, ...]:
    """Return the nodes of the Slurm job that this process is a part of, from the job's environment variables.

    All nodes of the job have as many GPUs and CPUs as the node of the batch script. Raises UsageError outside of a job,
    and for device `cuda` in a job without GPUs.
    """
    listed = variables.get("SLURM_JOB_NODELIST")
    if listed is None or shutil.which("srun") is None:
        raise UsageError("--slurm: this is not a job of Slurm; give the command in a script for sbatch, or in salloc")
    names = subprocess.run(
        ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True
    ).stdout.split()
    num_gpus = int(variables.get("SLURM_GPUS_ON_NODE", "0"))
    if device == "cuda" and not num_gpus:
        raise UsageError("--slurm --device cuda: the job has no GPUs; ask for them, for example with --gpus-per-node=8")
    if num_gpus and device != "cpu":
        kind = variables.get("SLURM_GPUS_PER_NODE", "").rpartition(":")[0]
        return tuple(Node(name, name, num_gpus, kind or "GPU") for name in names)
    return tuple(Node(name, name, int(variables.get("SLURM_CPUS_ON_NODE", "1"))) for name in names)


def slurm_cluster(device: str | None, logs: Path) -> Cluster:
    """Return the places of the Slurm job that this process is a part of. Raises UsageError as `slurm_nodes` does."""
    nodes = slurm_nodes(device)
    switchboard = Switchboard()
    return Cluster(_Slurm(nodes, logs, switchboard), switchboard)


class _Slurm:
    def __init__(self, nodes: Sequence[Node], logs: Path, switchboard: Switchboard) -> None:
        self._nodes, self._logs, self._switchboard = nodes, logs, switchboard
        self._steps: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def _log(self, name: str) -> Path:
        return self._logs / f"srun-{name}.log"

    def open(self, name: str, asked: Seats) -> None:
        batch_node = os.environ.get("SLURMD_NODENAME", platform.node())
        host = [sys.executable, "-m", "moebench.run.workers.host"]
        with self._log(name).open("ab") as log:
            self._steps[name] = subprocess.Popen(
                [*step(asked), *host, "--supervisor", f"{batch_node}:{self._switchboard.port}", "--seat", name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches only the supervisor
                env={**os.environ, KEY: self._switchboard.key.hex()},
            )

    def over(self, name: str) -> str:
        code = self._steps[name].poll()
        if code is None:
            return ""
        with self._log(name).open("rb") as log:
            said = tail(log.fileno()).splitlines()
        return f"srun exited with {code}{': ' if said else ''}{said[-1] if said else ''}"

    def close(self, name: str) -> None:
        """The hosts end by themselves when their connections end, and then the step ends."""

    def end(self) -> None:
        for process in self._steps.values():
            for stop in (lambda: None, process.terminate, process.kill):
                stop()
                try:
                    process.wait(END_TIMEOUT_S)
                    break
                except subprocess.TimeoutExpired:
                    continue


def step(asked: Seats, variables: Mapping[str, str] = os.environ) -> list[str]:
    """Return the command that runs one task on each node of `asked`, beside other steps of the job.

    The step has its own GPUs and its share of the CPUs. `--mem=0` lets it use the job's memory without taking it from
    other steps. A task that fails leaves the others alone, because the supervisor decides what ends.
    """
    num_nodes, node = len(asked.nodes), asked.nodes[0]
    num_cpus = int(variables.get("SLURM_CPUS_ON_NODE", "1"))
    share = max(1, num_cpus * asked.num_slots // node.num_slots)
    command = ["srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1"]
    command += [f"--nodelist={','.join(one.name for one in asked.nodes)}", "--exact", f"--cpus-per-task={share}"]
    command += [f"--gpus-per-node={asked.num_slots}"] if node.kind is not None else []
    return [*command, "--mem=0", "--no-kill", "--kill-on-bad-exit=0"]
