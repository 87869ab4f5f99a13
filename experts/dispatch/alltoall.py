"""Send each token once to every rank that holds one of the token's experts, and sum the results that come back.

This is the dispatcher `alltoall`. The ranks first exchange the numbers of tokens (the sizes), then one message between
each pair of ranks carries rows, routing weights and indices (`experts.messages`). While the host waits for the sizes,
the device packs the messages. While the messages travel, the device writes the message of the rank to itself.
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
from experts.dispatch.collectives import begin_all_to_all, begin_sizes
from experts.errors import Unsupported
from experts.messages import Form, Plan, messages_on


@dataclass(frozen=True)
class _Route:
    """What combine and both backward passes need to move the rows of one dispatch.

    `send` and `receive` have the number of rows of the message to each rank and from each rank. A message to this rank
    itself is not sent, so its number in `send` is 0.
    """

    plan: Plan
    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup

    def out(self, packed_SD: Tensor, *tokens: Tensor) -> Tensor:
        """Send the packed messages, and return the messages that this rank receives, also from itself.

        `tokens` are x [T, D], and routing weights and indices [T, K] if they are in the messages.
        """
        received_RD = packed_SD.new_empty(sum(self.receive), packed_SD.shape[1])
        sent = packed_SD[: sum(self.send)].split_with_sizes(self.send)
        received = [*received_RD.split_with_sizes(self.receive)]
        own_SD, received[self.plan.own] = received[self.plan.own], sent[self.plan.own]
        travel = begin_all_to_all(received, [*sent], self.group)
        messages_on(packed_SD.device).pack_own(self.plan, own_SD, *tokens)
        travel()
        return received_RD

    def back(self, rows_RD: Tensor, weights_RK: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Send rows, and weights if given, back to the ranks that they came from.

        Returns the sums over the ranks for each token of this rank, [T, D] and [T, K]. The rows must be in the order in
        which this rank received the tokens.
        """
        rows = self._come_back(rows_RD)
        weights = None if weights_RK is None else self._come_back(weights_RK)
        return messages_on(rows_RD.device).sum_rows(self.plan, rows, weights)

    def _come_back(self, rows_RX: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows that other ranks send back, and those of this rank's message to itself, which stay here."""
        back_SX = rows_RX.new_empty(sum(self.send), rows_RX.shape[1])
        back = back_SX.split_with_sizes(self.send)
        rows = [*rows_RX.contiguous().split_with_sizes(self.receive)]
        own_SX, rows[self.plan.own] = rows[self.plan.own], back[self.plan.own]
        begin_all_to_all([*back], rows, self.group)()
        return back_SX, own_SX


class AllToAll(OverGroup):
    """The dispatcher over one process group, gloo or NCCL.

    Each rank holds `n_local_experts` experts, in the order of the ranks.
    """

    def __init__(self, group: dist.ProcessGroup, n_local_experts: int) -> None:
        super().__init__(group)
        self._n_local_experts = n_local_experts

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        """Return the tokens that chose an expert of this rank, and a few rows that are no tokens, with indices of −1.

        Waits once for the device, to get the sizes.
        """
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
        messages, own = messages_on(x_TD.device), group.rank()
        form = Form(x_TD.shape[1], weights_TK.shape[1], x_TD.dtype, weights_TK.dtype)
        row_TP, sizes_2P = messages.plan(indices_TK, group.size(), n_local_experts)
        sizes = begin_sizes(sizes_2P, group)
        plan = Plan(form, row_TP, sizes_2P[0], own)
        packed_SD = messages.pack(plan, x_TD, weights_TK, indices_TK)
        send, receive = ([form.length(count) for count in counts] for counts in sizes())
        send[own] = 0
        ctx.route = route = _Route(plan, send, receive, group)
        x_RD = route.out(packed_SD, x_TD, weights_TK, indices_TK)
        weights_RK, indices_RK = messages.take_choices(x_RD, sizes_2P[1], max(receive), form)
        ctx.mark_non_differentiable(indices_RK)
        return x_RD, weights_RK, indices_RK, route

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_x_RD: Tensor, grad_weights_RK: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        route: _Route = ctx.route
        of_x, of_weights = ctx.needs_input_grad[:2]
        grad_x_TD, grad_weights_TK = route.back(grad_x_RD, grad_weights_RK if of_weights else None)
        return grad_x_TD if of_x else None, grad_weights_TK, None, None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return route.back(y_RD)[0]

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        route: _Route = ctx.route
        packed_SD = messages_on(grad_TD.device).pack(route.plan, grad_TD)
        return route.out(packed_SD, grad_TD), None
