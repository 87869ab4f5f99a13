"""Read far outside of allocated memory in a Triton kernel. It has its own module, because Triton may be missing."""

import torch
import triton
import triton.language as tl


@triton.jit
def _read(source, target, offset):  # type: ignore[no-untyped-def]
    tl.store(target, tl.load(source + offset))


def read_out_of_bounds() -> None:
    """Read out of bounds. This call raises, and every later call on that GPU in this process also raises."""
    source = torch.zeros(4, device="cuda")
    _read[(1,)](source, torch.zeros(1, device="cuda"), 2**42)
    torch.cuda.synchronize()
