"""Multiply rows by their experts' matrices in Triton. The GEMM can gather its rows and apply the weighted activation.

Importing this package imports triton.
"""

from experts.gemm.products import (
    activated_product,
    gathered_product,
    gathered_product_back,
    product,
    product_back,
)

__all__ = ["activated_product", "gathered_product", "gathered_product_back", "product", "product_back"]
