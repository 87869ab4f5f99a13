"""Measure the memory of a callable, in bytes. This module knows no backend.

The peak is counted above a floor, which is the memory in use before the call.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Memory:
    """The memory of one call.

    `peak_bytes` is the peak above the floor. `saved_bytes` is the memory that forward keeps for backward, without the
    output; it is None if the call has no backward. `reserved_bytes` is the memory that torch's caching allocator takes
    from the GPU for the call, after the allocator's cache was emptied. The allocator takes whole segments, so the part
    above the peak is lost to fragmentation. `outside_bytes` is the GPU memory in use that torch's allocator does not
    hold: contexts, libraries, communication buffers. On a CPU, `reserved_bytes` and `outside_bytes` are None.
    """

    peak_bytes: int
    saved_bytes: int | None
    reserved_bytes: int | None = None
    outside_bytes: int | None = None


def measure_memory(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object] | None, device: torch.device
) -> Memory:
    """Run forward, and backward if there is one, and count the bytes that they allocate.

    On a GPU, the counts come from torch's caching allocator. On a CPU, StorageTracker follows every tensor that torch's
    operators make.
    """
    gc.collect()
    return (_measure_gpu if device.type == "cuda" else _measure_cpu)(forward, backward, device)


def _measure_gpu(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object] | None, device: torch.device
) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    floor, reserved_floor = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    output = forward()
    saved = None
    if backward is not None:
        saved = torch.cuda.memory_allocated(device) - floor - _storage_bytes(output)
        backward(output)
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    return Memory(
        torch.cuda.max_memory_allocated(device) - floor,
        saved,
        torch.cuda.max_memory_reserved(device) - reserved_floor,
        outside,
    )


def _measure_cpu(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object] | None, device: torch.device
) -> Memory:
    with StorageTracker() as tracker:
        output = forward()
        saved = None
        if backward is not None:
            saved = tracker.live_bytes - _storage_bytes(output)
            backward(output)
    return Memory(tracker.peak_bytes, saved)


def _storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


class StorageTracker(TorchDispatchMode):
    """A mode that counts the bytes of each storage that an operator makes, until the storage is freed.

    It does not see memory that an operator allocates and frees inside itself. Storages that existed before the mode was
    entered do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._living: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_identity(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _identity(leaf) not in before:
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        identity, num_bytes = _identity(tensor), storage.nbytes()
        if identity in self._living:
            return
        self._living.add(identity)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, identity, num_bytes)

    def _forget(self, identity: int, num_bytes: int) -> None:
        self._living.discard(identity)
        self.live_bytes -= num_bytes


def _identity(tensor: Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity
