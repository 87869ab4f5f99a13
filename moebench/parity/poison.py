"""The allocator's free memory filled with NaN, so that memory read before it was written shows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moebench.parity.judge import SMALL_BLOCK


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Fill memory that operators leave uninitialised with NaN, so that whoever reads it is found out.

    On a CPU by torch's own deterministic filling; on a GPU by leaving NaN in the caching allocator's free blocks.
    """
    if device.type == "cuda":
        _poison_free_blocks(device)
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _poison_free_blocks(device: torch.device) -> None:
    """Take every free block of the caching allocator, by its exact size, fill it and give it back."""
    free: list[int] = []
    stream = torch.cuda.current_stream(device).cuda_stream
    for segment in torch.cuda.memory_snapshot():
        sizes = [block["size"] for block in segment["blocks"] if block["state"] == "inactive"]
        if (segment["device"], segment["stream"]) != (device.index, stream):  # blocks are a stream's own
            continue
        if segment["segment_type"] == "small":  # serves requests of up to SMALL_BLOCK, and nothing else does
            free += [min(SMALL_BLOCK, size - start) for size in sizes for start in range(0, size, SMALL_BLOCK)]
        else:
            free += [size for size in sizes if size > SMALL_BLOCK]
    blocks = [torch.empty(size, dtype=torch.uint8, device=device) for size in sorted(free, reverse=True)]
    for block in blocks:
        block.fill_(0xFF)  # all ones is NaN in every float format
