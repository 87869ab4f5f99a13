"""Send every token to every rank with an all-gather, and sum the results with a reduce-scatter.

This is the dispatcher `allgather`. Each rank computes only its own experts. Ranks may have different numbers of tokens,
even zero. Each rank pads its tokens to the largest number of tokens of any rank. The padding rows have choices of −1.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from experts.config import MoEConfig
from experts.dispatch import Dispatched, OverGroup
from experts.dispatch.collectives import AllGatherChoices, AllGatherRows, ReduceScatterRows, largest
from experts.errors import Unsupported


class AllGather(OverGroup):
    """The dispatcher over one process group, gloo or NCCL."""

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        """Return every rank's tokens, in the order of the ranks.

        Waits for the device once, to get the largest number of tokens of any rank.
        """
        num_tokens = x_TD.shape[0]
        missing = largest(num_tokens, self._group, x_TD.device) - num_tokens
        x_RD = AllGatherRows.apply(_pad(x_TD, missing, 0.0), self._group)
        choices = _pad(weights_TK, missing, 0.0), _pad(indices_TK, missing, -1)
        weights_RK, indices_RK = AllGatherChoices.apply(*choices, self._group)
        return Dispatched(x_RD, weights_RK, indices_RK, num_tokens)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return this rank's tokens [T, D], summed over the ranks in y's dtype."""
        num_tokens: int = dispatched.origin
        share_TD: Tensor = ReduceScatterRows.apply(y_RD, self._group)
        return share_TD[:num_tokens]


def make(group: ProcessGroup, config: MoEConfig) -> AllGather:
    """Return the dispatcher over a group."""
    return AllGather(group)


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return None: allgather carries every dtype on every device."""
    return None


def _pad(rows: Tensor, missing: int, value: float) -> Tensor:
    return F.pad(rows, (0, 0, 0, missing), value=value) if missing else rows
