"""Define tokens in FP8, as they travel between ranks, and how they lie in one row of memory.

A token has a float32 scale for 128 values, as the rows of `experts.fp8.blocks.Rows`. Here the scales of a token lie
next to each other, so that they travel with the token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from experts.fp8.blocks import num_blocks

#: A packed token takes a multiple of this number of bytes, which allows the widest loads and stores.
ALIGNMENT_BYTES = 16
#: Packed tokens are numbers of this dtype, because nothing computes with them.
PACKED = torch.int32


class Fp8Tokens(Tensor):
    """Tokens [T, D], or their gradients, in FP8 with scales. To autograd they are a tensor of 16 bits.

    So their gradients are in 16 bits, and gradients in FP8 can be those of a tensor of 16 bits. A function that does
    not know this class reads what `in_16_bits` returns.

    `quantised` is [T, D] in FP8, and `scales` is [T, blocks of D] in float32. The numbers of a token are contiguous in
    both, but there may be gaps between tokens. `dtype` is the dtype of 16 bits.
    """

    quantised: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, quantised: Tensor, scales: Tensor, dtype: torch.dtype) -> "Fp8Tokens":
        """Return the tokens. Copies nothing."""
        made: Fp8Tokens = Tensor._make_wrapper_subclass(cls, quantised.shape, dtype=dtype, device=quantised.device)
        made.quantised, made.scales = quantised, scales
        return made

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute an operation of torch from the values in 16 bits."""
        if function is torch.ops.aten.detach.default:
            (tokens,) = args
            return Fp8Tokens(tokens.quantised, tokens.scales, tokens.dtype)
        args, kwargs = tree_map_only(Fp8Tokens, in_16_bits, (args, kwargs or {}))
        return function(*args, **kwargs)


def in_16_bits(tokens: Tensor) -> Tensor:
    """Return the values of `Fp8Tokens` times their scales, rounded to 16 bits. Return another tensor unchanged."""
    if not isinstance(tokens, Fp8Tokens):
        return tokens
    from experts.fp8.dequantise import dequantise

    return dequantise(tokens)


def packed_width(dim: int) -> int:
    """Return how many numbers of `PACKED` a packed token of `dim` values takes. `dim` must be a multiple of 16."""
    num_bytes = dim + num_blocks(dim) * torch.float32.itemsize
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES // PACKED.itemsize


def unpacked(packed_TW: Tensor, dim: int, fmt: torch.dtype, dtype: torch.dtype) -> Fp8Tokens:
    """Return the tokens in packed rows [T, `packed_width`], which have first values, then scales. Copies nothing."""
    quantised = packed_TW.view(fmt)[:, :dim]
    first = dim // PACKED.itemsize
    return Fp8Tokens(quantised, packed_TW.view(torch.float32)[:, first : first + num_blocks(dim)], dtype)
