"""Hold a layer that is being tried, its calls, and the comparison of what it computed with the oracle.

Passes that share parameters and gradients are compared together: their tokens are put one after the other, because the
gradient of a parameter over several calls is its gradient over the tokens of all of them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moebench.parity import judge
from moebench.parity.adapters import Lora
from moebench.parity.judge import TensorError
from moebench.parity.passes import stacked_grads
from moebench.parity.play import draw
from moebench.parity.reference import Tensors
from moebench.parity.space.trial import Trial
from moebench.workload.case import Case
from moebench.workload.inputs import Inputs
from moebench.workload.ranks import ALONE, Ranks, is_dtensor, sharded

FIELDS = tuple(field.name for field in dataclasses.fields(Inputs))


@dataclass(frozen=True)
class Stage:
    """Where a trial is played. `build` returns the trial's layer with parameters that nobody has set.

    `lora` has the rank and alpha of the layer's adapters, if it has any.
    `ranks` are the ranks that share the layer's experts, and `rank` is this process among all that play the trial.
    """

    build: Callable[[Trial], nn.Module]
    device: torch.device
    fp8: str | None = None
    lora: Lora | None = None
    ranks: Ranks = ALONE
    rank: int = 0

    @property
    def lora_scale(self) -> float:
        """The factor of the layer's adapters; 0 without adapters."""
        return 0.0 if self.lora is None else self.lora.scale

    def share(self, whole: Tensors) -> Tensors:
        """Return this rank's experts of stacked parameters."""
        local = {}
        for name, tensor in whole.items():
            count = tensor.shape[0] // self.ranks.size
            local[name] = tensor[self.ranks.rank * count : (self.ranks.rank + 1) * count].clone()
        return local

    def state(self, parameters: Tensors) -> dict[str, Tensor]:
        """Return a state dict of this rank's parameters, which shares no memory with them."""
        mesh = self.ranks.mesh
        if mesh is None:
            return {name: tensor.clone() for name, tensor in parameters.items()}
        return {name: sharded(tensor.clone(), mesh) for name, tensor in parameters.items()}


@dataclass
class Call:
    """One call of a layer: the tensors that it was handed, the lines that drew them, and what it returned.

    `copy` has the output's values right after the call. `in_graph` is true if a backward may follow, and `is_done` if
    none will. `rewritten` is true once other values were written into the tensors that it was handed.
    """

    number: int
    handed: Inputs
    lines: list[str]
    output: Tensor
    copy: Tensor
    in_graph: bool
    autocast: bool = False
    is_done: bool = False
    rewritten: bool = False

    def inputs(self, device: torch.device, grad: Tensor | None = None) -> Inputs:
        """Return what the call should have read: the same draw again, so that no write into it counts."""
        drawn = draw.run_lines(self.lines, device)
        return drawn if grad is None else dataclasses.replace(drawn, grad_TD=grad)

    @property
    def values(self) -> Tensor:
        """The output in x's dtype. Under autocast a layer may return autocast's dtype."""
        return self.copy.to(self.handed.x_TD.dtype) if self.autocast else self.copy


@dataclass(frozen=True)
class Pass:
    """A pass that will be compared: what it read, what it computed, and the numbers of its call and backward."""

    inputs: Inputs
    tensors: Tensors
    call: int
    backward: int | None = None


@dataclass
class Player:
    """A layer with the parameters that it must have, and its passes that have not been compared yet.

    `number` counts the layers of a trial. `trial` has the layer's configuration. `forwards` and `trains` are the passes
    without and with a backward.
    """

    number: int
    trial: Trial
    layer: nn.Module
    parameters: Tensors
    wanted: draw.Wanted
    calls: list[Call] = field(default_factory=list)
    forwards: list[Pass] = field(default_factory=list)
    trains: list[Pass] = field(default_factory=list)

    @property
    def waiting(self) -> list[Call]:
        """The calls that have no backward yet, oldest first."""
        return [call for call in self.calls if call.in_graph and not call.is_done]

    def finish(self, call: Call, device: torch.device) -> None:
        """Compare a call's output only, because it has no backward."""
        call.is_done = True
        self.forwards.append(Pass(call.inputs(device), {"output": call.values}, call.number))

    def grads(self) -> Tensors:
        """Return the gradients of the parameters, under the names of a pass."""
        return {f"{name}.grad": grad for name, grad in stacked_grads(self.layer).items()}

    def compare(self, stage: Stage) -> Iterator["Compared"]:
        """Yield the comparisons of the passes since the last one."""
        for call in self.waiting:
            self.finish(call, stage.device)
        for passes, mode in ((self.forwards, "forward"), (self.trains, "train")):
            if passes:
                tensors = _together([one.tensors for one in passes])
                tensors |= self.grads() if mode == "train" else {}
                yield self.check(stage, passes, [tensors], mode)
        self.forwards, self.trains = [], []

    def check(self, stage: Stage, passes: Sequence[Pass], tensors: list[Tensors], mode: str) -> "Compared":
        """Compare tensors over the inputs of all these passes together."""
        case = self.trial.case.model_copy(update={"mode": mode})
        # on a GPU the oracle's many small operators take longer than on a CPU
        home = torch.device("cpu") if stage.ranks.mesh is None else stage.device
        fields = [torch.cat([getattr(one.inputs, name) for one in passes]) for name in FIELDS]
        inputs = Inputs(*(tensor.detach().to(home) for tensor in fields))
        parameters = _moved(self.parameters, home)
        tensors = [_moved(one, home) for one in tensors]
        verdict = judge.check(
            case,
            inputs,
            parameters,
            tensors,
            stage.fp8,
            stage.ranks,
            self.wanted.names,
            # under autocast a layer may compute in autocast's dtype
            torch.bfloat16 if any(call.autocast for call in self.calls) else None,
            partly=True,
            lora_scale=stage.lora_scale,
        )
        return Compared(verdict.tensor_errors, self, tuple(passes), case, inputs, parameters, tensors)

    def look_back(self, device: torch.device) -> Iterator[tuple[Call, TensorError]]:
        """Yield whether a later step changed what a call returned, and whether a call changed what it was handed."""
        for call in self.calls:
            yield call, same_bits("output", "after later calls", call.output.detach(), call.copy)
            if not call.rewritten:
                drawn = draw.run_lines(call.lines, device)
                for name in FIELDS:
                    handed = getattr(call.handed, name).detach()
                    yield call, same_bits(name, "after the call that was handed it", handed, getattr(drawn, name))


@dataclass(frozen=True)
class Compared:
    """Passes of a player, over all of their inputs, and the errors that the comparison with the oracle found."""

    errors: tuple[TensorError, ...]
    player: Player
    passes: tuple[Pass, ...]
    case: Case
    inputs: Inputs
    parameters: Tensors
    tensors: list[Tensors]


def same_bits(tensor: str, where: str, found: Tensor | None, expected: Tensor | None) -> TensorError:
    """Return no error if both tensors have the same bits, or are both missing; else an infinite error."""
    sides = [{} if one is None else {tensor: one} for one in (found, expected)]
    return TensorError(tensor, where, 0.0 if judge.are_identical(sides) else math.inf, 1.0)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's share of a parameter."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _moved(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _together(passes: Sequence[Tensors]) -> Tensors:
    names = [name for name in passes[0] if all(name in one for one in passes)]
    return {name: torch.cat([one[name] for one in passes]) for name in names}
