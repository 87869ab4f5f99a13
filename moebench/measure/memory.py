"""Measure the memory of a callable, in bytes. This module knows no backend.

The peak is counted above a floor, which is the memory in use before the call.
"""

import contextlib
import ctypes
import dataclasses
import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moebench.parity.poison import poisoned
from moebench.workload.ranks import Ranks, is_dtensor


@dataclass(frozen=True)
class Memory:
    """The memory of one call.

    `peak_bytes` is the peak above the floor. `saved_bytes` is the memory that forward keeps for backward, without the
    output; it is None if the call has no backward. `reserved_bytes` is the memory that torch's caching allocator takes
    from the GPU for the call, after the allocator's cache was emptied. The allocator takes whole segments, so the part
    above the peak is lost to fragmentation. `outside_bytes` is the GPU memory in use that torch's allocator does not
    hold: contexts, libraries, communication buffers. On a CPU, `reserved_bytes` and `outside_bytes` are None.

    `untracked_bytes` is the memory that the call took and that torch does not count: on a CPU the part of the peak of
    the process's resident memory that is not in tensors, on a GPU the growth of `outside_bytes`. It is None if the
    system does not tell.
    """

    peak_bytes: int | None
    saved_bytes: int | None
    reserved_bytes: int | None = None
    outside_bytes: int | None = None
    untracked_bytes: int | None = None


def measure_memory(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object] | None, device: torch.device
) -> Memory:
    """Run forward, and backward if there is one, and count the bytes that they allocate.

    On a GPU, the counts come from torch's caching allocator. On a CPU, StorageTracker follows every tensor that torch's
    operators make.
    """
    return (_measure_gpu if device.type == "cuda" else _measure_cpu)(forward, backward, device)


def largest(weighed: Memory, held_bytes: int | None, ranks: Ranks, module: nn.Module) -> dict[str, int | None]:
    """Return each column of memory, with the figure of the rank where this figure is largest.

    `held_bytes` is what no tensor holds since the first call. What later calls take besides counts as well. The module
    may tell the bytes of the quantised weights that it keeps.
    """
    if weighed.untracked_bytes is not None and held_bytes is not None:
        weighed = dataclasses.replace(weighed, untracked_bytes=held_bytes + weighed.untracked_bytes)
    told: list[Any] = [one.cached_weight_bytes for one in module.modules() if hasattr(one, "cached_weight_bytes")]
    by_rank = ranks.tell(weighed)
    figures: dict[str, list[int | None]] = {
        "peak_memory_bytes": [rank.peak_bytes for rank in by_rank],
        "saved_memory_bytes": [rank.saved_bytes for rank in by_rank],
        "cached_weight_bytes": list(ranks.tell(sum(told) if told else None)),
        "reserved_memory_bytes": [rank.reserved_bytes for rank in by_rank],
        "outside_torch_bytes": [rank.outside_bytes for rank in by_rank],
        "untracked_memory_bytes": [rank.untracked_bytes for rank in by_rank],
    }
    return {name: max((figure for figure in row if figure is not None), default=None) for name, row in figures.items()}


def foreign_bytes(device: torch.device) -> int | None:
    """Return the bytes in use that torch does not count: on a GPU what its allocator does not hold.

    On a CPU torch does not count at all, so that the result is the process's resident memory. It is None if the system
    does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # give freed memory back
    return _resident_bytes("VmRSS")


class Held:
    """The memory that a backend takes from now on, and that no tensor of torch holds.

    On a CPU, torch first loads what the first pass of any backend loads.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu":
            with poisoned(device):
                x = torch.ones(2, 2, requires_grad=True)
                (x @ x).sum().backward()
        self._device, self._before = device, foreign_bytes(device)

    def bytes_beside(self, module: nn.Module, tensors: Iterable[Tensor]) -> int | None:
        """Return the bytes that were taken, without the module's and these tensors; None if the system does not tell.

        On a GPU, torch's tensors do not count in the first place.
        """
        now = foreign_bytes(self._device)
        if now is None or self._before is None:
            return None
        known = 0 if self._device.type == "cuda" else _bytes_of((*module.parameters(), *module.buffers(), *tensors))
        return max(0, now - self._before - known)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum((tensor.to_local() if is_dtensor(tensor) else tensor).nbytes for tensor in tensors)


def _resident_bytes(name: str) -> int | None:
    """Return the resident memory of this process, now ("VmRSS") or at its peak ("VmHWM")."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return None


def _measure_gpu(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object] | None, device: torch.device
) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    outside_before = foreign_bytes(device)
    floor, reserved_floor = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    output = forward()
    saved = None
    if backward is not None:
        saved = torch.cuda.memory_allocated(device) - floor - _storage_bytes(output)
        backward(output)
    torch.cuda.synchronize(device)
    outside = foreign_bytes(device)
    assert outside is not None
    assert outside_before is not None
    return Memory(
        torch.cuda.max_memory_allocated(device) - floor,
        saved,
        torch.cuda.max_memory_reserved(device) - reserved_floor,
        outside,
        max(0, outside - outside_before),
    )


def _measure_cpu(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object] | None, device: torch.device
) -> Memory:
    with storage_tracker():
        torch.zeros(1)  # the first use of the tracker loads modules
    before = foreign_bytes(device)
    restarted = _restart_peak()
    with storage_tracker() as tracker:
        output = forward()
        saved = None
        if backward is not None:
            saved = tracker.live_bytes - _storage_bytes(output)
            backward(output)
    peak = _resident_bytes("VmHWM") if restarted else None
    untracked = None if peak is None or before is None else max(0, peak - before - tracker.peak_bytes)
    return Memory(tracker.peak_bytes, saved, untracked_bytes=untracked)


def _restart_peak() -> bool:
    """Let the kernel count the peak of the resident memory from now on. Return whether it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@dataclass
class _Followed:
    """The size of a storage before the tracker saw it, and the bytes that the tracker counts for it now."""

    floor_bytes: int
    counted_bytes: int = 0


class StorageTracker(TorchDispatchMode):
    """A mode that counts the bytes of each storage that an operator makes, until the storage is freed.

    Storages may grow and shrink. A storage that existed before the mode was entered counts only by its growth. The mode
    does not see memory that an operator allocates and frees inside itself.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import its compiler at the first operator, which takes seconds, to keep it out of the mode."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._followed: dict[int, _Followed] = {}
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> "StorageTracker":
        self._patches.enter_context(_resizes_seen_by(self))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        for storage in _storages(given):
            self.follow(storage, storage.nbytes())
        result = func(*args, **(kwargs or {}))
        for storage in _storages([*given, *tree_leaves(result)]):
            self.follow(storage, 0)
            self.count(storage)
        return result

    def follow(self, storage: torch.UntypedStorage, floor_bytes: int) -> None:
        """Follow a storage from now on, unless the tracker follows it already."""
        identity = storage._cdata
        if identity not in self._followed:
            self._followed[identity] = _Followed(floor_bytes)
            weakref.finalize(storage, self._forget, identity)

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count the present size of a storage that the tracker follows."""
        followed = self._followed[storage._cdata]
        num_bytes = max(storage.nbytes() - followed.floor_bytes, 0)
        self.live_bytes += num_bytes - followed.counted_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        followed.counted_bytes = num_bytes

    def _forget(self, identity: int) -> None:
        self.live_bytes -= self._followed.pop(identity).counted_bytes


class _OutsideTheCompiler(StorageTracker):
    """A tracker that torch keeps its compiler out of, for backends that are compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def storage_tracker() -> StorageTracker:
    """Return a tracker for a process that has imported torch's compiler, or for one that has not."""
    return _OutsideTheCompiler() if "torch._dynamo" in sys.modules else StorageTracker()


def _storages(leaves: list[Any]) -> list[torch.UntypedStorage]:
    """Return the storages among the leaves, and the storages of the tensors among them."""
    tensors = [leaf.untyped_storage() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return [leaf for leaf in tensors if isinstance(leaf, torch.UntypedStorage)]


@contextlib.contextmanager
def _resizes_seen_by(tracker: StorageTracker) -> Iterator[None]:
    """Let the tracker count after `UntypedStorage.resize_`, which is no operator: a mode does not see it."""
    resize = torch.UntypedStorage.resize_

    def counted_resize(storage: torch.UntypedStorage, num_bytes: int) -> Any:
        tracker.follow(storage, storage.nbytes())
        result = resize(storage, num_bytes)
        tracker.count(storage)
        return result

    torch.UntypedStorage.resize_ = counted_resize  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
