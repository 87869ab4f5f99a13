"""All-to-all: a token goes once to every rank that holds one of its experts, and comes back from each.

Sizes travel first; then rows, with split sizes both ways. Ranks are to tokens here what experts are in
`experts.permutation`: sorting, gathering and summing are the same functions.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from experts.dispatch import Dispatched
from experts.dispatch.collectives import AllToAllChoices, AllToAllRows, all_to_all_rows
from experts.permutation import Permutation, permute, sort_by_expert, unpermute


@dataclass(frozen=True)
class _Route:
    """How rows went out: by rank, so many sent to and received from each."""

    by_rank: Permutation
    send: list[int]
    receive: list[int]


class AllToAll:
    """Dispatcher over one process group, gloo or NCCL; `n_local_experts` experts a rank, in the order of the ranks."""

    def __init__(self, group: dist.ProcessGroup, n_local_experts: int) -> None:
        self._group = group
        self._n_local_experts = n_local_experts

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        """The tokens that chose an expert of this rank. Waits for the device once, for the sizes."""
        route = self._route(indices_TK)
        sizes = route.send, route.receive, self._group
        x_RD = AllToAllRows.apply(permute(x_TD, route.by_rank), *sizes)
        choices = permute(weights_TK, route.by_rank), indices_TK.index_select(0, route.by_rank.row_to_token_N)
        weights_RK, indices_RK = AllToAllChoices.apply(*choices, *sizes)
        return Dispatched(x_RD, weights_RK, indices_RK, route)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Every rank's part of this rank's tokens, summed in float32 in the order of the ranks."""
        route: _Route = dispatched.origin
        rows_ND = AllToAllRows.apply(y_RD, route.receive, route.send, self._group)
        return unpermute(rows_ND, route.by_rank)

    def _route(self, indices_TK: Tensor) -> _Route:
        num_ranks = self._group.size()
        ranks_R = torch.arange(num_ranks, device=indices_TK.device)
        rank_TK = indices_TK // self._n_local_experts  # of −1, −1
        wanted_TR = (rank_TK.unsqueeze(-1) == ranks_R).any(dim=1)
        by_rank = sort_by_expert(torch.where(wanted_TR, ranks_R, -1), 0, num_ranks)
        send_R = by_rank.tokens_per_expert_L
        receive_R = all_to_all_rows(send_R, [1] * num_ranks, [1] * num_ranks, self._group)
        send, receive = torch.stack([send_R, receive_R]).tolist()
        return _Route(by_rank.cut(sum(send)), send, receive)
