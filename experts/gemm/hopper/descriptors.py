"""Describe tensors to the tensor memory accelerator (TMA), which copies tiles between global and shared memory.

A tile that reaches over an end of its tensor is read as zeros there, and not written there. The rows of an expert's
group need the same treatment at the end of the group, which lies inside of the tensor and is known only on the device.
`grouped_rows` describes rows so that each copy can bring its own end: it adds two dimensions in front, whose strides
add up to a multiple of 2⁶⁴ bytes, so that a large index in the first dimension moves the third dimension's end to the
end of the group. Triton's `triton.tools.ragged_tma` does the same for Triton's own kernels.
"""

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout, constexpr
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

#: The end of the third dimension of `grouped_rows`, and its first index in each copy. No tensor may have more rows.
MOST_ROWS = constexpr(2**30)
_UNLIMITED = 2**31 - 2**16
#: The stride that, 2³⁰ times, is a multiple of 2⁶⁴ bytes for every size of an element.
_WHOLE_ROUND = 2**34
SWIZZLE_BYTES = 128


def shared_layout(rank: int, element_bits: int = 16) -> NVMMASharedLayout:
    """Return the layout of a tile in shared memory: swizzled rows, which tensor cores read in 16 bits an element."""
    return NVMMASharedLayout(swizzle_byte_width=SWIZZLE_BYTES, element_bitwidth=element_bits, rank=rank)


def described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Return the descriptor of a contiguous tensor, in blocks that have the tensor's rank."""
    layout = shared_layout(len(block), 8 * tensor.element_size())
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


def grouped_rows(rows_NP: Tensor, block: list[int]) -> TensorDescriptor:
    """Return the descriptor of contiguous rows [N, P] in blocks [rows, columns], for copies that end with a group.

    A copy of the block at `row` of the group that ends at `end` has the indices
    [MOST_ROWS, end, MOST_ROWS − end + row, column].
    """
    width = rows_NP.shape[1]
    shape = [_UNLIMITED, _UNLIMITED, MOST_ROWS.value, width]
    strides = [_WHOLE_ROUND - width, width, width, 1]
    return TensorDescriptor(rows_NP, shape, strides, [1, 1, *block], shared_layout(4))


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor in contiguous memory that starts at a multiple of 16 bytes, as the TMA needs it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
