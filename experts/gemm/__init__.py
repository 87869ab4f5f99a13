"""Multiply rows by their experts' matrices in Triton. The GEMM can gather its rows and apply the weighted activation.

The package also adds gradients of the weights to float32 gradients, and on Hopper GPUs it computes these gradients.
Importing this package imports triton.
"""

from experts.gemm.accumulation import add_outer
from experts.gemm.few import few_tokens, takes_few
from experts.gemm.gradients import gathered_outer, outer, outer_gathered, runs_on_hopper
from experts.gemm.products import (
    activated_back,
    activated_product,
    gathered_product,
    gathered_product_back,
    kept_and_activated,
    product,
    product_back,
)

__all__ = [
    "activated_back",
    "activated_product",
    "add_outer",
    "few_tokens",
    "gathered_outer",
    "gathered_product",
    "gathered_product_back",
    "kept_and_activated",
    "outer",
    "outer_gathered",
    "product",
    "product_back",
    "runs_on_hopper",
    "takes_few",
]
