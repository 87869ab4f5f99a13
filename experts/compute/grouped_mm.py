"""Multiply rows by their experts' matrices with `torch.nn.functional.grouped_mm`, and check the width of the rows."""

import functools

import torch
from torch import Tensor

from experts.compute.whole import Products
from experts.config import MoEConfig, dtype_name, is_gated_activation
from experts.errors import Unsupported

ROW_ALIGNMENT_BYTES = 16
#: With more groups, torch 2.11 raises "Can't process more than 1024 groups" on an H200 (2026-11-28).
MOST_GROUPS = 1023


def products(offsets_L: Tensor) -> Products:
    """Return grouped_mm's matrix products, for groups of rows that end at the offsets [L] (int32, cumulative).

    grouped_mm does not read rows past the last offset, and it leaves these rows uninitialised in its results. Raises
    Unsupported for more groups than the kernel on a GPU takes.
    """
    if offsets_L.is_cuda and offsets_L.shape[0] > MOST_GROUPS:
        raise Unsupported(
            f"grouped_mm on a GPU takes at most {MOST_GROUPS} experts a rank, these are {offsets_L.shape[0]}; "
            "use the loop, or more ranks"
        )
    multiply = functools.partial(torch.nn.functional.grouped_mm, offs=offsets_L)
    return Products(
        rows=lambda a_NP, b_LPQ: multiply(_readable(a_NP), _readable(b_LPQ)),
        rows_back=lambda a_NQ, b_LPQ: multiply(_readable(a_NQ), _readable(b_LPQ).transpose(-2, -1)),
        outer=lambda a_NP, b_NQ: multiply(_readable(a_NP).t(), _readable(b_NQ)),
    )


def _readable(matrices: Tensor) -> Tensor:
    """Return the rows [N, P] or matrices [L, P, Q] in a layout that the kernels read: a copy, or the tensor itself.

    The kernels read matrices by rows or by columns that lie one after another, without overlap. Memory, and every row,
    column and matrix, must start at a multiple of 16 bytes. Tensors sliced from a larger one may not.
    """
    height, width = matrices.shape[-2:]
    down, across = matrices.stride()[-2:]
    dense = (across == 1 and down >= width) or (down == 1 and across >= height)
    multiple = ROW_ALIGNMENT_BYTES // matrices.element_size()
    if not dense or any(stride % multiple for stride in matrices.stride() if stride != 1):
        return matrices.clone(memory_format=torch.contiguous_format)
    return matrices.clone() if matrices.data_ptr() % ROW_ALIGNMENT_BYTES else matrices


def unaligned(config: MoEConfig, who: str = "grouped_mm") -> Unsupported | None:
    """Return why the kernels called `who` cannot take the config's rows, or None where they can.

    The size of a row must be a multiple of 16 bytes. This package does not pad rows.
    """
    gated = is_gated_activation(config.expert_activation)
    widths = {
        "dim": config.dim,
        "2·moe_inter_dim" if gated else "moe_inter_dim": config.moe_inter_dim * (2 if gated else 1),
        "moe_inter_dim": config.moe_inter_dim,
    }
    for name, width in widths.items():
        num_bytes = width * config.dtype.itemsize
        if num_bytes % ROW_ALIGNMENT_BYTES:
            return Unsupported(
                f"{who} takes rows that are a multiple of {ROW_ALIGNMENT_BYTES} bytes, but {name} = {width} in "
                f"{dtype_name(config.dtype)} is {num_bytes}; choose a multiple of "
                f"{ROW_ALIGNMENT_BYTES // config.dtype.itemsize}, or the loop"
            )
    return None
