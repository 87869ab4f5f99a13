"""Multiply rows that are grouped by expert on Hopper GPUs (SM90), with kernels whose warps have different tasks.

In these kernels, one group of warps only loads operands and others only multiply and store. So a program loads the
operands of its next tile while it stores the tile before. A third group may compute what follows from a tile. Triton's
compiler does not divide the work of a kernel in this way for Hopper, so the kernels are written in Gluon, the language
below Triton, which comes with Triton.

Importing this package imports Gluon.
"""

from experts.gemm.hopper.finished import activated_back, kept_and_activated
from experts.gemm.hopper.launching import add_outer, outer
from experts.gemm.hopper.rows import activated_product, product

__all__ = ["activated_back", "activated_product", "add_outer", "kept_and_activated", "outer", "product"]
