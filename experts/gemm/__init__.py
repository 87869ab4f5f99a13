"""A grouped GEMM in Triton that gathers its rows and applies the weighted activation. Importing this imports triton."""

from experts.gemm.products import (
    activated_product,
    gathered_product,
    gathered_product_back,
    product,
    product_back,
)

__all__ = ["activated_product", "gathered_product", "gathered_product_back", "product", "product_back"]
