"""Send every token to every rank with an all-gather, and sum the results with a reduce-scatter.

This is the dispatcher `allgather`. Each rank computes only its own experts. Ranks may have different numbers of tokens,
even zero. Each rank pads its tokens to the largest number of tokens of any rank. The padding rows have choices of −1.
Ranks that declare equal numbers of tokens need no padding, and the host does not wait.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from experts.config import MoEConfig
from experts.dispatch import Dispatched, OverGroup
from experts.dispatch.collectives import AllGatherChoices, AllGatherRows, ReduceScatterRows, largest
from experts.errors import InputError, Unsupported


class AllGather(OverGroup):
    """The dispatcher over one process group, gloo or NCCL.

    With `equal_tokens`, every rank passes the same number of tokens in every call. At the first dispatch, the ranks
    compare their numbers, and the host waits for that. No later dispatch waits, and a CUDA graph can hold it. A rank
    never sends another number of rows than the ranks have agreed on: it raises InputError instead, before it sends
    anything. The other ranks then wait for this rank until their process group's timeout.
    """

    def __init__(self, group: ProcessGroup, equal_tokens: bool = False) -> None:
        super().__init__(group)
        self._equal_tokens = equal_tokens
        self._agreed: int | None = None

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        """Return every rank's tokens, in the order of the ranks.

        Without `equal_tokens`, waits for the device once, to get the largest number of tokens of any rank. Raises
        InputError if the ranks do not pass equal numbers of tokens although they have declared it.
        """
        num_tokens = x_TD.shape[0]
        if self._equal_tokens:
            self._check_equal(num_tokens, x_TD.device)
            num_rows = num_tokens
        else:
            num_rows = largest(num_tokens, self._group, x_TD.device)
        x_RD = AllGatherRows.apply(_pad(x_TD, num_rows), self._group)
        weights_RK, indices_RK = AllGatherChoices.apply(weights_TK, indices_TK, self._group, num_rows)
        return Dispatched(x_RD, weights_RK, indices_RK, num_tokens)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return this rank's tokens [T, D], summed over the ranks in y's dtype."""
        num_tokens: int = dispatched.origin
        share_TD: Tensor = ReduceScatterRows.apply(y_RD, self._group)
        return share_TD[:num_tokens]

    def _check_equal(self, num_tokens: int, device: torch.device) -> None:
        remedy = "with equal_tokens = True every call of every rank has the same number; pad them, or leave it out"
        if self._agreed is None:
            most, fewest = largest(num_tokens, self._group, device), -largest(-num_tokens, self._group, device)
            if most != fewest:
                raise InputError(
                    f"x has {num_tokens} tokens on this rank, and from {fewest} to {most} on all ranks, but {remedy}"
                )
            self._agreed = num_tokens
        if num_tokens != self._agreed:
            raise InputError(f"x has {num_tokens} tokens, and had {self._agreed} in the first call, but {remedy}")


def make(group: ProcessGroup, config: MoEConfig, equal_tokens: bool = False) -> AllGather:
    """Return the dispatcher over a group."""
    return AllGather(group, equal_tokens)


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return None: allgather carries every dtype on every device."""
    return None


def _pad(rows_TD: Tensor, num_rows: int) -> Tensor:
    missing = num_rows - rows_TD.shape[0]
    return F.pad(rows_TD, (0, 0, 0, missing)) if missing else rows_TD
