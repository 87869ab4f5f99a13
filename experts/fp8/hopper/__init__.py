"""Multiply in FP8 on Hopper GPUs (SM90). One warp loads operands, and two groups of four warps multiply.

A tile of the result has 128 rows and two blocks of 128 columns. Each of the two groups has 64 of the rows. Tensor cores
sum 128 products, in a precision of about 14 bits. The group then adds the sums, times their scales, to sums in float32.
The two groups take turns: while one group adds, the tensor cores multiply for the other group.
Importing this package imports Gluon, the language below Triton, which comes with Triton.
"""

from experts.fp8.hopper.activated import multiply_and_activate
from experts.fp8.hopper.outer import outer
from experts.fp8.hopper.rows import multiply

__all__ = ["multiply", "multiply_and_activate", "outer"]
