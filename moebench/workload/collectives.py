"""Run collectives over a process group, without autograd.

The harness has its own, so that neither what it gathers nor the ceilings that it measures depend on the revision of
`experts` that it drives. torch 2.13 renamed two functions and warns about the old names. torch 2.11 has only the old
names.
"""

import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return every rank's rows, in the order of the ranks. All ranks must have the same number of rows."""
    gathered = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
    _all_gather(gathered, rows.contiguous(), group=group)
    return gathered


def reduce_scatter_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum over the ranks of this rank's share of the rows."""
    share = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    _reduce_scatter(share, rows.contiguous(), group=group)
    return share


def all_to_all_rows(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send `send[r]` consecutive rows to each rank r, and return `receive[r]` rows from each rank r, in their order."""
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received
