"""Turn tokens in FP8 back into 16 bits, in one kernel that reads its input once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.fp8.blocks import num_blocks
from experts.fp8.quantise import _BLOCK, BLOCKS_AT_ONCE
from experts.fp8.tokens import Fp8Tokens
from experts.steps.fused.launch import launch


def dequantise(tokens: Fp8Tokens) -> Tensor:
    """Return the values [T, D] times their scales, in the tokens' dtype."""
    num_tokens, dim = tokens.shape
    out = torch.empty(num_tokens, dim, dtype=tokens.dtype, device=tokens.device)
    blocks = min(BLOCKS_AT_ONCE, triton.next_power_of_2(num_blocks(dim)))
    launch(
        dequantise_rows,
        (num_tokens, triton.cdiv(num_blocks(dim), blocks)),
        *(tokens.quantised, tokens.scales, out, dim, tokens.quantised.stride(0), tokens.scales.stride(0)),
        BLOCKS=blocks,
        num_warps=4,
    )
    return out


@triton.jit
def dequantise_rows(values, scales, out, dim, values_stride, scales_stride, BLOCKS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = column < dim
    tile = tl.load(values + token * values_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + token * scales_stride + block, mask=block < tl.cdiv(dim, _BLOCK), other=0.0)
    tl.store(out + token * dim + column, (tile * scale[:, None]).to(out.dtype.element_ty), mask=inside)
