"""Compute the local experts with matrix products in FP8, whose operands have one float32 scale a block.

A block is 128 values of a row of tokens, activations or gradients, or 128 × 128 values of a weight. The last block of a
dimension may be smaller. `experts.fp8.blocks` describes the format. Importing the package's kernels imports triton.
"""
