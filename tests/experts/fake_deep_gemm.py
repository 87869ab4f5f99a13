"""A fake of DeepGEMM (sgl-deep-gemm 0.1.5, on SM90) in plain torch. It stands in for the library, and runs no FP8.

It has the library's assertions. Memory that the library leaves unwritten is NaN here. The library returns only
bfloat16. The fake also returns float16, which the tests in Triton's interpreter use.
"""

from types import ModuleType

import torch
from torch import Tensor

#: Rows of a group are a multiple of this number.
ALIGNMENT = 128
BLOCK = 128


def m_grouped_fp8_gemm_nt_contiguous(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, grouped_layout: Tensor
) -> None:
    """Write [N, Q] to d: each row of a [N, P] times the transpose of its expert's matrix of b [L, Q, P].

    a is E4M3 with a scale for 128 values of a row, and b with a scale for 128 × 128 values. `grouped_layout` [N] is
    each row's expert, or negative. There may be gaps between the rows of d.
    """
    (rows, row_scales), (matrices, matrix_scales) = a, b
    (n, p), (experts, q, p_) = rows.shape, matrices.shape
    assert rows.dtype is matrices.dtype is torch.float8_e4m3fn
    assert row_scales.dtype is matrix_scales.dtype is torch.float32
    assert (p, d.shape) == (p_, (n, q))
    assert rows.is_contiguous()
    assert matrices.is_contiguous()
    assert d.stride(1) == 1
    needs_16 = (p, q, d.stride(0) * d.element_size(), d.storage_offset() * d.element_size())
    assert not any(size % 16 for size in needs_16), "the tensor memory accelerator needs rows of 16 bytes"
    p_blocks, q_blocks = -(-p // BLOCK), -(-q // BLOCK)
    assert row_scales.shape == (n, p_blocks)
    assert row_scales.stride() == (1, -(-n // 4) * 4), "otherwise the library copies the scales"
    assert matrix_scales.shape == (experts, q_blocks, p_blocks)
    assert matrix_scales.is_contiguous()
    assert (grouped_layout.dtype, grouped_layout.shape) == (torch.int32, (n,))
    left = rows.float() * row_scales.repeat_interleave(BLOCK, 1)[:, :p]
    right = matrices.float() * _spread(matrix_scales)[:, :q, :p]
    d.fill_(torch.nan)
    for start in range(0, n, ALIGNMENT):
        tile = slice(start, start + ALIGNMENT)
        (expert,) = set(grouped_layout[tile].tolist())  # the kernels read only the first row's
        if expert >= 0:
            d[tile] = (left[tile] @ right[expert].t()).to(d.dtype)


def _spread(scales: Tensor) -> Tensor:
    return scales.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)


def modules() -> dict[str, ModuleType]:
    """Return the fake module by the name that `import` uses."""
    package = ModuleType("deep_gemm")
    package.m_grouped_fp8_gemm_nt_contiguous = m_grouped_fp8_gemm_nt_contiguous  # type: ignore[attr-defined]
    return {"deep_gemm": package}
