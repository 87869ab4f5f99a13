"""Multiply in FP8 on Hopper GPUs (SM90). One warp loads operands, and two groups of four warps multiply.

A tile of the result has 128 rows and two blocks of 128 columns. Each of the two groups has 64 of the rows, which it
reads into registers once a step. Tensor cores sum 128 products for 64 columns at a time, in a precision of about 14
bits. The group adds these sums, times their scales, to sums in float32 while the tensor cores multiply the next 64
columns.
Importing this package imports Gluon, the language below Triton, which comes with Triton.
"""

from experts.fp8.hopper.activated import multiply_and_activate
from experts.fp8.hopper.outer import outer
from experts.fp8.hopper.rows import multiply

__all__ = ["multiply", "multiply_and_activate", "outer"]
