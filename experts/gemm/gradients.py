"""Compute the gradients of the weights: the sum of aᵀ·b over each expert's rows. The functions run on Hopper GPUs.

Tokens are read in place, so no gathered copy of their rows is made. No function waits for the device. No row past the
last group is read, and an expert without rows gets zeros. Sums are in float32.
"""

import functools

import torch
from torch import Tensor

from experts.steps import Permutation

HOPPER = (9, 0)
#: The copies of rows count them up to this number.
MOST_ROWS = 2**30


def runs_on_hopper(device: torch.device, num_rows: int) -> bool:
    """Return whether the kernels of `experts.gemm.hopper` run on a device, for this number of rows."""
    return device.type == "cuda" and num_rows < MOST_ROWS and _capability(device) == HOPPER


def outer(a_NP: Tensor, b_NQ: Tensor, permutation: Permutation) -> Tensor:
    """Return [L, P, Q]: the sum of aᵀ·b over each expert's rows, in a's dtype."""
    from experts.gemm import hopper

    return hopper.outer(a_NP, b_NQ, permutation, gather=False)


def gathered_outer(x_TP: Tensor, b_NQ: Tensor, permutation: Permutation) -> Tensor:
    """Return what `outer` returns if a is each row's token of x [T, P]."""
    from experts.gemm import hopper

    return hopper.outer(x_TP, b_NQ, permutation, gather=True)


def outer_gathered(a_NP: Tensor, x_TQ: Tensor, permutation: Permutation) -> Tensor:
    """Return what `outer` returns if b is each row's token of x [T, Q]."""
    from experts.gemm import hopper

    return hopper.outer(x_TQ, a_NP, permutation, gather=True, transposed=True)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
