"""Connect the processes that measure one case together: one process per rank, or a single process at ep_size 1.

The harness has collectives of its own, without autograd, so that neither what it gathers nor the ceilings that it
measures depend on the revision of `experts` that it drives. torch 2.13 renamed two functions and warns about the old
names. torch 2.11 has only the old names.
"""

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

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_T = TypeVar("_T")
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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
    """This process as one of the `size` ranks that run a case. All ranks must call each method together.

    `mesh` are the ranks that share the experts; None if each rank has all of them. `dp_mesh` are the ranks that hold
    the same experts, one of each group of expert parallelism; None for one group. Rank r is rank r modulo `ep_size` of
    its group.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    dp_mesh: DeviceMesh | None = None

    @property
    def ep_size(self) -> int:
        """The number of ranks that share the experts."""
        return self.size if self.dp_mesh is None else self.size // self.dp_mesh.size()

    @property
    def ep_rank(self) -> int:
        """This process among the ranks that share the experts."""
        return self.rank % self.ep_size

    @property
    def is_alone(self) -> bool:
        """Whether there is no process group, because this process is the only one."""
        return self.mesh is None and self.dp_mesh is None

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group of the ranks that share the experts. Only a process with a mesh has one."""
        assert self.mesh is not None
        return self.mesh.get_group()

    @property
    def everyone(self) -> dist.ProcessGroup:
        """The process group of all ranks."""
        if self.dp_mesh is None:
            return self.group
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    @property
    def sharing(self) -> "Ranks":
        """This process as one of the ranks that share the experts, without the other groups."""
        return self if self.dp_mesh is None else Ranks(self.ep_rank, self.ep_size, self.mesh)

    def tell(self, value: _T) -> list[_T]:
        """Return every rank's value, in the order of the ranks."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.everyone)
        return values

    def largest(self, value: float) -> float:
        """Return the largest value of any rank."""
        return max(self.tell(value))

    def rows(self, rows: Tensor) -> Tensor:
        """Return every rank's rows, in the order of the ranks. Ranks may have different numbers of rows."""
        return rows if self.is_alone else _gathered(rows, self.everyone, self.size)

    def unsharded(self, rows: Tensor) -> Tensor:
        """Return the rows of the ranks that hold the same experts, in the order of these ranks."""
        return rows if self.dp_mesh is None else _gathered(rows, self.dp_mesh.get_group(), self.dp_mesh.size())

    def sum(self, tensor: Tensor) -> None:
        """Replace the tensor, in place, by its sum over the ranks that share the experts."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.group)

    def align(self, device: torch.device) -> None:
        """Wait until all ranks have made this call. On a GPU the device waits, and the host goes on."""
        if self.is_alone:
            return
        if device.type == "cuda":
            dist.all_reduce(torch.zeros(1, device=device), group=self.everyone)
        else:
            dist.barrier(group=self.everyone)


def _gathered(rows: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
    counts: list[Any] = [None] * size
    dist.all_gather_object(counts, rows.shape[0], group=group)
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = all_gather_rows(padded, group).split(max(counts)) if max(counts) else [padded] * size
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


ALONE = Ranks()
#: A rank that fails waits this long for another rank to end. If no other rank ends, the failure is its own.
GONE_WITHIN_S = 2.0


def join(device: torch.device, timeout_s: float, dp_size: int = 1) -> Ranks:
    """Join the group that torch.distributed's launcher started this process in: gloo on a CPU, NCCL on GPUs.

    The processes are `dp_size` groups of ranks that share the experts. In a process without a launcher, return Ranks(),
    which is one rank without a mesh.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    on_gpu = device.type == "cuda"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, device_id=device if on_gpu else None)
    return ranks_of(device, dp_size)


def ranks_of(device: torch.device, dp_size: int = 1) -> Ranks:
    """Return this process as a rank among all processes, in `dp_size` groups of ranks that share the experts."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if dp_size == 1:
        return Ranks(rank, size, init_device_mesh(device.type, (size,), mesh_dim_names=("ep",)))
    both = init_device_mesh(device.type, (dp_size, size // dp_size), mesh_dim_names=("dp", "ep"))
    return Ranks(rank, size, both["ep"] if size > dp_size else None, both["dp"])


def leave(ranks: Ranks) -> None:
    """Free the buffers and the process group that the ranks share."""
    if not ranks.is_alone:
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


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return every rank's rows, in the order of the ranks. All ranks must have the same number of rows."""
    gathered = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
    _all_gather(gathered, rows.contiguous(), group=group)
    return gathered


def reduce_scatter_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum over the ranks of this rank's share of the rows."""
    share = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    _reduce_scatter(share, rows.contiguous(), group=group)
    return share


def all_to_all_rows(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send `send[r]` consecutive rows to each rank r, and return `receive[r]` rows from each rank r, in their order."""
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received
