"""Make memory that all ranks of a group read and write, and the barrier between them.

On GPUs, torch's symmetric memory maps the memory of every rank into every process, and the barrier is a kernel that
exchanges signals. On a CPU, the ranks map files that are only in memory and have no name, so that nothing is left if a
rank is killed. There, the barrier is an all-reduce over gloo.
"""

import atexit
import mmap
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experts.errors import InputError, Unsupported
from experts.exchange import Layout, Region, Slabs
from experts.hosts import hosts_of, tell

#: Each kernel has code for every rank, and a host has no more GPUs than this.
MAX_RANKS = 64

_shared: dict[tuple[dist.ProcessGroup, torch.device, Layout], Slabs] = {}


def shared_slabs(group: dist.ProcessGroup, device: torch.device, layout: Layout) -> Slabs:
    """Return the slabs that all layers with this layout share.

    The first call makes the slabs, waits for all ranks and for the device, and cannot be captured in a CUDA graph.
    Raises InputError if the ranks ask for different layouts, and Unsupported, on all ranks, if a rank cannot reach
    another rank's memory.
    """
    key = group, device, layout
    if key not in _shared:
        with torch.inference_mode(mode=False):  # tensors of inference mode could not be written to outside of it
            _shared[key] = (_on_gpus if device.type == "cuda" else _on_cpu)(group, device, layout)
    return _shared[key]


def destroy_buffers() -> None:
    """Free the slabs of all groups. All ranks must call this function before they destroy their process group.

    A layer makes its slabs again at its next forward. A CUDA graph that was captured before must not be replayed.
    """
    if any(device.type == "cuda" for _, device, _ in _shared):
        torch.cuda.synchronize()
    _shared.clear()


atexit.register(destroy_buffers)


def ranks_cannot_share(group: dist.ProcessGroup) -> Unsupported | None:
    """Return why the ranks of a group cannot share memory, or None. All ranks must call it, and all return the same."""
    if group.size() > MAX_RANKS:
        return Unsupported(f"symm_mem runs on at most {MAX_RANKS} ranks, the group has {group.size()}; use alltoall")
    hosts = hosts_of(group)
    if len(set(hosts)) > 1:
        return Unsupported(
            f"symm_mem needs all ranks on one host, the group's ranks are on {len(set(hosts))}; use alltoall"
        )
    return None


def _check_layouts(layouts: list[Layout]) -> None:
    for rank, layout in enumerate(layouts):
        if layout != layouts[0]:
            raise InputError(
                f"symm_mem: rank 0 needs {layouts[0]}, but rank {rank} needs {layout}; all ranks must pass x and "
                "weights of the same dtype, to layers with the same configuration"
            )


def _on_gpus(group: dist.ProcessGroup, device: torch.device, layout: Layout) -> Slabs:
    if torch.cuda.is_current_stream_capturing():
        raise InputError(
            "symm_mem makes its buffers in a first forward, outside of a CUDA graph; run one, then capture"
        )
    from torch.distributed import _symmetric_memory as symmetric_memory

    with torch.cuda.device(device):
        told = tell(group, (layout, str(torch.cuda.get_device_properties(device).uuid)))
        _check_layouts([its_layout for its_layout, _ in told])
        reasons = tell(group, _unreachable(device, group.rank(), [uuid for _, uuid in told]))
        if any(reasons):
            raise Unsupported(next(filter(None, reasons)))
        # not symmetric_memory.empty: it takes memory from a pool, which counts it as memory of torch's allocator
        allocate: Any = symmetric_memory._SymmetricMemory.empty_strided_p2p  # type: ignore[attr-defined]
        memory = allocate((layout.num_bytes,), (1,), torch.uint8, device)
        handle = symmetric_memory.rendezvous(memory, group)
        memories = [handle.get_buffer(rank, (layout.num_bytes,), torch.uint8) for rank in range(group.size())]
    timeout_ms = _timeout_of(group, device) // timedelta(milliseconds=1)
    return _over(memories, layout, group.rank(), lambda: handle.barrier(channel=0, timeout_ms=timeout_ms), memory)


def _unreachable(device: torch.device, rank: int, uuids: list[str]) -> str | None:
    """Return why this rank's GPU cannot reach the memory of another rank's GPU, or None.

    A process can ask only about GPUs that it sees. About the others, torch decides.
    """
    seen = {str(torch.cuda.get_device_properties(index).uuid): index for index in range(torch.cuda.device_count())}
    for peer, uuid in enumerate(uuids):
        if peer != rank and uuid == uuids[rank]:
            return f"symm_mem needs one GPU per rank, but ranks {rank} and {peer} have the same; use alltoall"
        index = seen.get(uuid, device.index)
        if index != device.index and not torch.cuda.can_device_access_peer(device.index, index):
            return f"the GPU of rank {rank} cannot reach the memory of rank {peer}'s (no P2P access); use alltoall"
    return None


def _timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """Return how long the group's collectives wait for another rank."""
    found: timedelta = group._get_backend(device).options._timeout
    return found


def _on_cpu(group: dist.ProcessGroup, device: torch.device, layout: Layout) -> Slabs:
    descriptor, problem = os.memfd_create("experts"), ""
    try:
        try:  # a file without its memory would end the process with a signal at its first write
            os.posix_fallocate(descriptor, 0, layout.num_bytes)
        except OSError as error:
            problem = (
                f"symm_mem needs {layout.num_bytes} bytes of shared memory on each rank: {error.strerror}; lower "
                "max_tokens_per_rank or capacity_factor, or use alltoall"
            )
        told = tell(group, (layout, problem, f"/proc/{os.getpid()}/fd/{descriptor}"))
        _check_layouts([its_layout for its_layout, _, _ in told])
        if problems := [its_problem for _, its_problem, _ in told if its_problem]:
            raise Unsupported(problems[0])
        memories = [_map(Path(path), layout.num_bytes) for _, _, path in told]
        _meet(group)  # the descriptors must stay open until all ranks have mapped the files
    finally:
        os.close(descriptor)
    return _over(memories, layout, group.rank(), lambda: _meet(group))


def _map(file: Path, num_bytes: int) -> Tensor:
    with file.open("r+b") as opened:
        return torch.frombuffer(mmap.mmap(opened.fileno(), num_bytes), dtype=torch.uint8)


def _meet(group: dist.ProcessGroup) -> None:
    """Wait until all ranks have called this function. An all-reduce ends on no rank before all have begun it."""
    dist.all_reduce(torch.zeros(1, device="cpu"), group=group)


def _over(memories: list[Tensor], layout: Layout, rank: int, barrier: Any, owner: object = None) -> Slabs:
    addresses_P = torch.tensor([memory.data_ptr() for memory in memories], device=memories[rank].device)
    regions = tuple(Region.over(memory, layout) for memory in memories)
    return Slabs(layout, rank, regions, addresses_P, barrier, owner)
