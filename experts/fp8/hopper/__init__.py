"""Multiply in FP8 on Hopper GPUs (SM90). One warp loads operands, and groups of four warps multiply.

A group has 64 rows of a tile of the result. Tensor cores sum 128 products, in a precision of about 14 bits. The group
then adds the sums, times their scales, to sums in float32, while the tensor cores multiply for another group.
The products of rows have three groups and one block of 128 columns. The gradients of weights, and the up projection
with its activation, have two groups and two blocks. These two groups take turns.
Rows for the gradients of weights are quantised and transposed in registers. The gradients of SwiGLU are
quantised for both products by the kernel that computes them.
Importing this package imports Gluon, the language below Triton, which comes with Triton.
"""

from experts.fp8.hopper.activated import multiply_and_activate
from experts.fp8.hopper.outer import outer
from experts.fp8.hopper.rows import multiply
from experts.fp8.hopper.turned import turn
from experts.fp8.hopper.turned_activation import activate_and_turn

__all__ = ["activate_and_turn", "multiply", "multiply_and_activate", "outer", "turn"]
