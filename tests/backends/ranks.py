"""Provide backends for expert parallelism with a fault on the last rank. The other ranks are right.

With this folder on PYTHONPATH, a test names a backend as a user would, for example `ranks:WrongRow`.
"""

import os
import signal
import threading

import torch
from torch import Tensor

from experts import BackendConfig, GroupedExperts, MoEConfig
from experts.compute import ExpertParameters


class _LastRankFails(GroupedExperts):
    engine_name = "loop"

    def __init__(self, config: MoEConfig, dispatcher: str | None = None) -> None:
        backend = BackendConfig(experts=self.engine_name, dispatcher=dispatcher)  # type: ignore[arg-type]
        super().__init__(config, backend)

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        if self.is_last:
            self.break_down()
        return super().forward(x, token_mask, weights, indices)

    @property
    def is_last(self) -> bool:
        assert self.ep_mesh is not None
        return self.ep_mesh.get_local_rank() == self.ep_mesh.size() - 1

    def break_down(self) -> None:
        """Fail on the last rank. The default does nothing."""


class WrongRow(_LastRankFails):
    """The last rank negates the output row of its third active token."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        output = super().forward(x, token_mask, weights, indices)
        active_N = token_mask.nonzero()
        if not self.is_last or len(active_N) < 3:
            return output
        wrong_T1 = torch.arange(len(x)).unsqueeze(-1) == active_N[2]
        return torch.where(wrong_T1, -output, output)


class WrongRowInLaterCalls(WrongRow):
    """The last rank's output is wrong only from its seventh call on, when it is timed."""

    num_calls = 0

    @property
    def is_last(self) -> bool:
        return self.num_calls > 6 and super().is_last

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        self.num_calls += 1
        return super().forward(x, token_mask, weights, indices)


class OwnTokensOnly(_LastRankFails):
    """The last rank's experts get gradients only from the last rank's tokens.

    Works only with the dispatcher `allgather`, which has the rows in the order of the ranks.
    """

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        right_RD = super().compute_local(x_RD, weights_RK, indices_RK)
        if not self.is_last:
            return right_RD
        assert self.ep_mesh is not None
        parameters = self.expert_parameters()
        frozen = type(parameters)(*(None if p is None else p.detach() for p in parameters))  # type: ignore[arg-type]
        first = self.first_local_expert
        others_RD = self.engine.compute(x_RD, weights_RK, indices_RK, frozen, self.config, first)
        own_R1 = torch.arange(len(x_RD)).unsqueeze(-1) >= len(x_RD) - len(x_RD) // self.ep_mesh.size()
        return torch.where(own_R1, right_RD, others_RD)


class ForeignWeightsDetached(_LastRankFails):
    """The last rank's experts return no gradient for the other rank's routing weights.

    Works only with the dispatcher `allgather` and two ranks.
    """

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        if self.is_last:
            own_R1 = torch.arange(len(x_RD)).unsqueeze(-1) >= len(x_RD) - len(x_RD) // 2
            weights_RK = torch.where(own_R1, weights_RK, weights_RK.detach())
        return super().compute_local(x_RD, weights_RK, indices_RK)


class Raises(_LastRankFails):
    def break_down(self) -> None:
        raise ZeroDivisionError("no tokens for this rank")


class RunsOutOfMemory(_LastRankFails):
    def break_down(self) -> None:
        raise MemoryError("this rank has no memory left")


class Dies(_LastRankFails):
    """The last rank dies in its second call, when the dispatcher has made what it keeps from call to call."""

    num_calls = 0

    def break_down(self) -> None:
        self.num_calls += 1
        if self.num_calls == 2:
            self.die()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class DiesInCompute(Dies):
    """The last rank dies in its second call, between dispatch and combine."""

    def break_down(self) -> None:
        self.num_calls += 1

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        if self.num_calls == 2:
            self.die()
        return super().compute_local(x_RD, weights_RK, indices_RK)


class DiesInBackward(Dies):
    """The last rank dies in the backward of its first call that has one, before the backward of combine."""

    def break_down(self) -> None:
        """Let forward go on."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        output = super().forward(x, token_mask, weights, indices)
        if self.is_last and output.requires_grad:
            output.register_hook(lambda gradient: self.die())
        return output


class Leaves(_LastRankFails):
    def break_down(self) -> None:
        os._exit(0)


class Hangs(_LastRankFails):
    def break_down(self) -> None:
        threading.Event().wait()


class _LastRankLeavesGraphs(_LastRankFails):
    """Right and without a wait for the GPU, but the last rank cannot be captured in a CUDA graph.

    It fails between dispatch and combine, when it has recorded a part of what the ranks do together.
    """

    engine_name = "torch_mm"

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        if self.is_last and torch.cuda.is_current_stream_capturing():
            self.leave_graph()
        return super().compute_local(x_RD, weights_RK, indices_RK)

    def leave_graph(self) -> None:
        raise NotImplementedError


class RefusesGraphs(_LastRankLeavesGraphs):
    def leave_graph(self) -> None:
        raise ValueError("not in a graph")


class WaitsInGraphs(_LastRankLeavesGraphs):
    def leave_graph(self) -> None:
        torch.cuda.synchronize()


class GradTwice(_LastRankFails):
    """The gradients of parameters are as many times too large as ranks share the experts: a reduction too many."""

    def expert_parameters(self) -> ExpertParameters:
        own, count = super().expert_parameters(), 1 if self.ep_mesh is None else self.ep_mesh.size()
        return ExpertParameters(*(None if one is None else count * one - (count - 1) * one.detach() for one in own))

    @property
    def is_last(self) -> bool:
        return False  # every rank has the fault
