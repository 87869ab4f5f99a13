"""A fake of grouped_gemm (0.3.0, on SM90) in plain torch.

It has the library's assertions. Memory that the library leaves unwritten is NaN here.
"""

from types import ModuleType

import torch
from torch import Tensor


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
    """Return [N, Q]: rows [N, P] in groups of `batch_sizes` [L], times matrices [L, P, Q] ([L, Q, P] with `trans_b`).

    With `trans_a`, return [L, P, Q]: per group, the transposed rows [N, P] times the rows [N, Q]. Like
    `grouped_gemm.backend.gmm`, it computes no gradients.
    """
    assert not (trans_a and trans_b)
    assert not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)), "no gradient comes back"
    if trans_a:
        return _outer_of_groups(a, b, batch_sizes)
    return _multiply_groups(a, b, batch_sizes, trans_b)


def _groups(batch_sizes: Tensor) -> list[slice]:
    assert batch_sizes.device.type == "cpu", "batch_sizes must be on the host"
    assert batch_sizes.dtype is torch.int64
    assert batch_sizes.ndim == 1
    assert batch_sizes.any(), "Input batch_sizes should not be all zeros!"
    ends = batch_sizes.cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _multiply_groups(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool) -> Tensor:
    assert (a.ndim, b.ndim) == (2, 3)
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert a.dtype is b.dtype
    assert batch_sizes.shape == b.shape[:1], "batch_sizes needs one size per expert"
    c = torch.full((a.shape[0], b.shape[1] if trans_b else b.shape[2]), torch.nan, dtype=a.dtype)
    for rows, matrix in zip(_groups(batch_sizes), b, strict=True):
        c[rows] = a[rows] @ (matrix.t() if trans_b else matrix)
    return c


def _outer_of_groups(a: Tensor, b: Tensor, batch_sizes: Tensor) -> Tensor:
    assert a.shape[0] == b.shape[0]
    assert a.is_contiguous()
    assert b.is_contiguous()
    c = torch.full((len(batch_sizes), a.shape[1], b.shape[1]), torch.nan, dtype=a.dtype)
    for expert, rows in enumerate(_groups(batch_sizes)):
        if rows.start < rows.stop:
            c[expert] = a[rows].t() @ b[rows]
    return c


def modules() -> dict[str, ModuleType]:
    """Return the fake modules by the name that `import` uses."""
    package, backend = ModuleType("grouped_gemm"), ModuleType("grouped_gemm.backend")
    package.backend, backend.gmm = backend, gmm  # type: ignore[attr-defined]
    return {"grouped_gemm": package, "grouped_gemm.backend": backend}
