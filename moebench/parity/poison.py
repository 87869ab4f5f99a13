"""Fill the allocator's free memory with NaN, so that a read of memory that nobody wrote shows in the results."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moebench.parity.judge import SMALL_BLOCK

#: Every allocation outside of a private pool is served from this pool.
_COMMON_POOL = (0, 0)


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Fill memory that operators leave uninitialised with NaN, so that a backend that reads it gives NaN.

    On a CPU, torch fills this memory itself in its deterministic mode. On a GPU, this function leaves NaN in the free
    blocks of the caching allocator.
    """
    if device.type == "cuda":
        _poison_free_blocks(device)
        yield
        return
    before = torch.get_deterministic_debug_mode()
    # use_deterministic_algorithms(True, warn_only=True) would also import the compiler, which takes seconds
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _poison_free_blocks(device: torch.device) -> None:
    """Allocate every free block of the caching allocator by its exact size, fill it with NaN and free it."""
    free: list[int] = []
    stream = torch.cuda.current_stream(device).cuda_stream
    for segment in torch.cuda.memory_snapshot():
        sizes = [block["size"] for block in segment["blocks"] if block["state"] == "inactive"]
        # a block serves one stream, and a private pool, for example of a CUDA graph, serves nobody else
        if (segment["device"], segment["stream"]) != (device.index, stream):
            continue
        if tuple(segment.get("segment_pool_id", _COMMON_POOL)) != _COMMON_POOL:
            continue
        if segment["segment_type"] == "small":  # only these serve requests of up to SMALL_BLOCK
            free += [min(SMALL_BLOCK, size - start) for size in sizes for start in range(0, size, SMALL_BLOCK)]
        else:
            free += [size for size in sizes if size > SMALL_BLOCK]
    blocks = [torch.empty(size, dtype=torch.uint8, device=device) for size in sorted(free, reverse=True)]
    for block in blocks:
        block.fill_(0xFF)  # all ones is NaN in every float format
