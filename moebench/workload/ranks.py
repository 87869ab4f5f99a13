"""Connect the processes that measure one case together: one process per rank, or a single process at ep_size 1."""

import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moebench.workload.collectives import all_gather_rows

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_T = TypeVar("_T")


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Return whether the value is a DTensor, and not of a subclass of it.

    Before somebody imports torch.distributed.tensor, which takes more than a second of CPU time, there are none.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and type(value) is module.DTensor


def sharded(local: Tensor, mesh: DeviceMesh) -> "DTensor":
    """Return a DTensor of all ranks' experts, of which `local` [L, …] holds this rank's."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(local, mesh, [Shard(0)])


@dataclass(frozen=True)
class Ranks:
    """This process as one of the `size` ranks of expert parallelism. All ranks must call each method together."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group. Only a process with a mesh has one."""
        assert self.mesh is not None
        return self.mesh.get_group()

    def tell(self, value: _T) -> list[_T]:
        """Return every rank's value, in the order of the ranks."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def largest(self, value: float) -> float:
        """Return the largest value of any rank."""
        return max(self.tell(value))

    def rows(self, rows: Tensor) -> Tensor:
        """Return every rank's rows, in the order of the ranks. Ranks may have different numbers of rows."""
        if self.mesh is None:
            return rows
        counts = self.tell(rows.shape[0])
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = all_gather_rows(padded, self.group).split(max(counts)) if max(counts) else [padded] * self.size
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def sum(self, tensor: Tensor) -> None:
        """Replace the tensor, in place, by its sum over all ranks."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.group)

    def align(self, device: torch.device) -> None:
        """Wait until all ranks have made this call. On a GPU the device waits, and the host goes on."""
        if self.mesh is None:
            return
        if device.type == "cuda":
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
        else:
            dist.barrier(group=self.group)


ALONE = Ranks()
#: A rank that fails waits this long for another rank to end. If no other rank ends, the failure is its own.
GONE_WITHIN_S = 2.0


def join(device: torch.device, timeout_s: float) -> Ranks:
    """Join the group that torch.distributed's launcher started this process in: gloo on a CPU, NCCL on GPUs.

    In a process without a launcher, return Ranks(), which is one rank without a mesh.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    on_gpu = device.type == "cuda"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, device_id=device if on_gpu else None)
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("ep",))
    return Ranks(dist.get_rank(), size, mesh)


def leave(ranks: Ranks) -> None:
    """Free the buffers and the process group that the ranks share."""
    if ranks.mesh is not None:
        from moebench.workload.driven import destroy_buffers

        destroy_buffers()
        dist.destroy_process_group()


def someone_is_gone(processes: Sequence[tuple[str, int]]) -> bool:
    """Whether one of the processes has ended, or ends within GONE_WITHIN_S.

    `processes` has (machine, process id) for each process. Only processes on this machine are seen. The wait is needed
    because a process closes its connections, which other ranks notice, a moment before it ends.
    """
    others = [pid for machine, pid in processes if machine == platform.node() and pid != os.getpid()]
    deadline = time.monotonic() + GONE_WITHIN_S
    while others and time.monotonic() < deadline:
        if any(_has_ended(pid) for pid in others):
            return True
        time.sleep(0.02)
    return False


def _has_ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
