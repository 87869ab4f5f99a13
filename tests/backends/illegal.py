"""A Triton kernel that reads far outside of what is allocated. A module of its own: Triton is not everywhere."""

import torch
import triton
import triton.language as tl


@triton.jit
def _read(source, target, offset):  # type: ignore[no-untyped-def]
    tl.store(target, tl.load(source + offset))


def read_out_of_bounds() -> None:
    """Raises, as every later call on that GPU does in this process: CUDA's context is broken."""
    source = torch.zeros(4, device="cuda")
    _read[(1,)](source, torch.zeros(1, device="cuda"), 2**42)
    torch.cuda.synchronize()
