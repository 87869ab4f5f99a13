"""Send each token once to every rank that holds one of the token's experts, and sum the results that come back.

This is the dispatcher `alltoall`. The ranks first exchange the numbers of rows (the sizes), then the rows. The
functions of `experts.steps` sort, gather and sum the rows, with ranks in place of experts. Before the host waits for
the sizes, it enqueues all work that does not need the sizes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts.autocast import without_autocast
from experts.config import MoEConfig
from experts.dispatch import Dispatched, OverGroup
from experts.dispatch.collectives import all_to_all_rows, pack_choices, unpack_choices
from experts.errors import Unsupported
from experts.steps import Permutation, steps_on


@dataclass(frozen=True)
class _Route:
    """The numbers that one dispatch uses to send rows, and that combine and backward use to send rows back.

    `by_rank` sorts the rows by rank. `send` and `receive` hold the number of rows that this rank sends to, and receives
    from, each rank.
    """

    by_rank: Permutation
    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup

    def out(self, rows: Tensor) -> Tensor:
        """Send rows that are sorted by rank to the ranks, and return the rows that this rank receives.

        Rows past the last rank's group are not sent.
        """
        return all_to_all_rows(rows[: sum(self.send)], self.send, self.receive, self.group)

    def back(self, rows: Tensor) -> Tensor:
        """Send rows back to the ranks that sent them, and return the rows that come back to this rank, sorted by rank.

        The rows must be in the order in which this rank received them.
        """
        return all_to_all_rows(rows, self.receive, self.send, self.group)


class AllToAll(OverGroup):
    """The dispatcher over one process group, gloo or NCCL.

    Each rank holds `n_local_experts` experts, in the order of the ranks.
    """

    def __init__(self, group: dist.ProcessGroup, n_local_experts: int) -> None:
        super().__init__(group)
        self._n_local_experts = n_local_experts

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        """Return the tokens that chose an expert of this rank. Waits once for the device, to get the sizes."""
        x_RD, weights_RK, indices_RK, route = _Dispatch.apply(
            x_TD, weights_TK, indices_TK, self._group, self._n_local_experts
        )
        return Dispatched(x_RD, weights_RK, indices_RK, route)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return this rank's tokens [T, D], summed over the ranks in y's dtype.

        The sum is taken in float32 (float64 for float64), in the order of the ranks.
        """
        tokens_TD: Tensor = _Combine.apply(y_RD, dispatched.origin)
        return tokens_TD


def make(group: dist.ProcessGroup, config: MoEConfig) -> AllToAll:
    """Return the dispatcher over a group, for the config's experts."""
    return AllToAll(group, config.n_routed_experts // group.size())


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return None: alltoall carries every dtype on every device."""
    return None


def _sort_by_rank(indices_TK: Tensor, num_ranks: int, n_local_experts: int) -> Permutation:
    """Return the permutation that groups tokens by destination rank. A token goes to a rank at most once."""
    ranks_R = torch.arange(num_ranks, device=indices_TK.device)
    rank_TK = indices_TK // n_local_experts  # −1 stays −1
    wanted_TR = (rank_TK.unsqueeze(-1) == ranks_R).any(dim=1)
    return steps_on(indices_TK.device).sort_by_expert(torch.where(wanted_TR, ranks_R, -1), 0, num_ranks)


def _exchange_sizes(by_rank: Permutation, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """Return the number of rows to send to each rank, and to receive from each rank. Waits for the device."""
    sizes_2R = by_rank.offsets_L.new_empty(2, group.size())
    torch.diff(by_rank.offsets_L, prepend=by_rank.offsets_L.new_zeros(1), out=sizes_2R[0])
    dist.all_to_all_single(sizes_2R[1], sizes_2R[0], group=group)
    send, receive = sizes_2R.tolist()
    return send, receive


class _Dispatch(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        indices_TK: Tensor,
        group: dist.ProcessGroup,
        n_local_experts: int,
    ) -> tuple[Tensor, Tensor, Tensor, _Route]:
        steps = steps_on(x_TD.device, x_TD.dtype)
        by_rank = _sort_by_rank(indices_TK, group.size(), n_local_experts)
        x_ND = steps.gather_rows(x_TD, by_rank)
        choices_NB = pack_choices(weights_TK, indices_TK).index_select(0, by_rank.row_to_token_N)
        ctx.route = route = _Route(by_rank, *_exchange_sizes(by_rank, group), group)
        x_RD = route.out(x_ND)
        weights_RK, indices_RK = unpack_choices(route.out(choices_NB), weights_TK.dtype)
        ctx.mark_non_differentiable(indices_RK)
        return x_RD, weights_RK, indices_RK, route

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_x_RD: Tensor, grad_weights_RK: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        route: _Route = ctx.route
        grads = []
        for grad_RC, wanted in zip((grad_x_RD, grad_weights_RK), ctx.needs_input_grad, strict=False):
            steps = steps_on(grad_RC.device, grad_RC.dtype)
            grads.append(steps.sum_rows(route.back(grad_RC), route.by_rank) if wanted else None)
        return *grads, None, None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return steps_on(y_RD.device, y_RD.dtype).sum_rows(route.back(y_RD), route.by_rank)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        route: _Route = ctx.route
        return route.out(steps_on(grad_TD.device, grad_TD.dtype).gather_rows(grad_TD, route.by_rank)), None
