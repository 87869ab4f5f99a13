"""Describe tensors in FP8 whose blocks have a float32 scale each.

A value of the tensor is an element times the scale of the element's block. A scale is the largest magnitude of the
block divided by the largest number of the format. So the largest value of a block becomes the largest FP8 number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.activations import activation_form
from experts.config import MoEConfig

#: Values of a row, and of each side of a weight, that share a scale.
BLOCK = 128
#: The smallest scale: that of a block of zeros. A smaller one would have an infinite reciprocal.
LEAST_SCALE = 2.0**-126

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def num_blocks(size: int) -> int:
    """Return how many blocks a dimension has, the last one possibly partial."""
    return -(-size // BLOCK)


def stored_width(width: int, halves: int, padded: bool) -> int:
    """Return how many columns a part has in memory. With `padded`, zeros fill up the last block of each of two parts.

    Then each part begins at a multiple of 128, as libraries need it that count blocks over the whole dimension.
    """
    return num_blocks(width) * BLOCK if padded and halves > 1 else width


def up_halves(config: MoEConfig) -> int:
    """Return 2 if the up projection has gate and up in halves, which have blocks of their own, else 1."""
    form = activation_form(config)
    return 2 if form.gated and not form.interleaved else 1


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, activations or gradients in FP8.

    A row consists of `halves` parts of equal width. Each part has its own blocks, so that no block has values of gate
    and of up. Zeros may fill up each of two parts (`stored_width`).
    """

    values: Tensor  # FP8 [N, C]
    scales: Tensor  # float32 [blocks of C, N]
    halves: int = 1


@dataclass(frozen=True)
class Matrices:
    """The weights of L experts in FP8, [L, Q, P], where P is the dimension over which a product sums.

    Each of the two dimensions consists of 1 or 2 parts with blocks of their own, as in `Rows`. Only parts of P may be
    filled up.
    """

    values: Tensor  # FP8 [L, Q, P]
    scales: Tensor  # float32 [L, blocks of Q, blocks of P]
    q_halves: int = 1
    p_halves: int = 1

    @property
    def num_bytes(self) -> int:
        """The bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes
