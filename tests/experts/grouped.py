"""Rows that are grouped by expert, and the sums that the gradients of the weights are made of."""

import torch
from torch import Tensor

from experts.steps import eager

#: Rows of each expert. A step has 64 rows.
GROUPS = [(64, 128), (1, 0, 63), (0, 65, 0, 0, 130, 7), (0, 0), (700, 0, 1)]
#: Columns of the two operands. A tile has 128 and 256.
WIDTHS = [(128, 256), (8, 16), (136, 264), (2880, 512)]


class Grouped:
    """Tokens, and rows of experts in permuted order. Rows past the last group, and tokens without a row, are NaN."""

    def __init__(
        self, rows: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype, device: str = "cuda"
    ) -> None:
        generator = torch.Generator().manual_seed(9)
        num_rows, unused = sum(rows), 70
        experts = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
        choices = torch.cat([experts, torch.full((unused,), -1)])[
            torch.randperm(num_rows + unused, generator=generator)
        ]
        self.permutation = eager.sort_by_expert(choices.view(-1, 1).to(device), 0, len(rows))
        self.x_TP, self.a_NP, self.b_NQ = (
            torch.randn(num_rows + unused, width, generator=generator).to(device, dtype)
            for width in (widths[0], widths[0], widths[1])
        )
        self.x_TP[choices.to(device) < 0] = torch.nan
        self.a_NP[num_rows:], self.b_NQ[num_rows:] = torch.nan, torch.nan
        self.rows = rows

    def right(self, a_NP: Tensor, b_NQ: Tensor) -> Tensor:
        """Return the sums in float64."""
        pairs = zip(a_NP.double().split([*self.rows, 70]), b_NQ.double().split([*self.rows, 70]), strict=True)
        return torch.stack([a.T @ b for a, b in list(pairs)[:-1]])


def assert_sums(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Allow sums in float32 and one rounding. Sums without terms are exactly zero."""
    assert (found.dtype, found.shape) == (dtype, right.shape)
    eps = torch.finfo(dtype).eps
    allowed = eps * right.abs() + 1e-5 * right.square().mean((1, 2), keepdim=True).sqrt()
    assert ((found.double() - right).abs() <= allowed).all()
