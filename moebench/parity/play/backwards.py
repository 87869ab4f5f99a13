"""Take the steps that run a backward pass, and the step that repeats calls. `Play` takes the other steps."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from moebench.parity import judge
from moebench.parity.judge import TensorError
from moebench.parity.play import draw
from moebench.parity.play.player import Call, Compared, Pass, Player, Stage, same_bits
from moebench.parity.play.script import Script
from moebench.parity.reference import Tensors
from moebench.parity.space.trial import Trial
from moebench.workload.inputs import Inputs

#: With this many calls, a fault in one of 50 calls is met with a probability of 0.99.
REPEATS = 230
#: The second gradient of `backward:twice` is that of inputs this many numbers later.
OTHER_GRAD = 50


class BackwardSteps:
    """The part of a `Play` that runs backward passes."""

    trial: Trial
    stage: Stage
    script: Script
    player: Player
    errors: list[TensorError]
    num_inputs: int
    deterministic: bool | None

    def _call(self, how: str) -> Call:
        raise NotImplementedError

    def _call_on(self, handed: Inputs, lines: list[str], how: str, is_new: bool = True) -> Call:
        raise NotImplementedError

    def _lines(self, number: int, tokens: int) -> list[str]:
        raise NotImplementedError

    def _memory(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _zero_grad(self, how: str = "") -> None:
        raise NotImplementedError

    def _judge(self, compared: Compared) -> None:
        raise NotImplementedError

    def _backward(self, how: str) -> None:
        player = self.player
        if not player.wanted.names:
            return
        waiting = player.waiting or [self._call("")]
        call = waiting[-1 if how == "newest" else 0]
        call.is_done = True
        grad = call.handed.grad_TD
        if how == "twice" and not getattr(player.layer, "backward_once", False):
            self._backward_of(call, grad, retain_graph=True)
            lines = self._lines(self.num_inputs + OTHER_GRAD, call.handed.x_TD.shape[0])
            grad = draw.run_lines(lines, self.stage.device).grad_TD
            self.script.other_grad(lines, call.number)
        if how == "grad":
            self._grad_of(call, grad)
        else:
            self._backward_of(call, grad)

    def _grad_of(self, call: Call, grad: Tensor) -> None:
        """Compute the gradients with torch.autograd.grad. They must not be in the tensors' `grad` before."""
        player = self.player
        before = player.grads()
        named = {name: p for name, p in player.layer.named_parameters() if p.requires_grad}
        leaves = {"x": call.handed.x_TD, "weights": call.handed.weights_TK, **named}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        number = self.script.grad(call.number, player.number, tuple(leaves))
        expected = grad.detach().clone()
        with self._memory():
            grads = torch.autograd.grad(call.output, list(leaves.values()), grad, allow_unused=True)
        for name in before.keys() | player.grads().keys():
            self.errors.append(same_bits(name, "written by autograd.grad", player.grads().get(name), before.get(name)))
        found = {name: one for name, one in zip(leaves, grads, strict=True) if one is not None}
        for name, parameter in named.items():
            if name in found:
                parameter.grad = found[name] if parameter.grad is None else parameter.grad + found[name]
        own = {f"{name}.grad": found[name] for name in ("x", "weights") if name in found}
        inputs = call.inputs(self.stage.device, expected)
        player.trains.append(Pass(inputs, {"output": call.values} | own, call.number, number))

    def _backward_of(self, call: Call, grad: Tensor, retain_graph: bool = False, told: bool = True) -> None:
        number = self.script.backward(call.number, retain_graph) if told else None
        expected = grad.detach().clone()
        with self._memory():
            call.output.backward(grad.to(call.output.dtype) if call.autocast else grad, retain_graph=retain_graph)
        tensors = {"output": call.values}
        for name, leaf in (("x", call.handed.x_TD), ("weights", call.handed.weights_TK)):
            if leaf.grad is not None:
                tensors[f"{name}.grad"] = leaf.grad
                leaf.grad = None
        self.player.trains.append(Pass(call.inputs(self.stage.device, expected), tensors, call.number, number))

    def _repeat(self, how: str) -> None:
        """Make many passes on two sets of inputs in turn, and compare those whose bits differ from earlier ones."""
        self._zero_grad()
        player = self.player
        kind = "" if player.wanted.names else "no_grad"
        firsts = []
        for _ in range(2):
            first = self._call(kind)
            self.script.add(f"set{first.number} = x{first.number}, mask, w{first.number}, i, dy{first.number}")
            firsts.append(first)
            self.num_inputs += 1
        sets: list[list[Tensors]] = [[], []]
        for number in range(REPEATS):
            first, different = firsts[number % 2], sets[number % 2]
            call = self._call_on(first.handed, first.lines, kind, is_new=False)
            player.calls.pop()
            tensors = {"output": call.copy}
            if call.in_graph:
                self._backward_of(call, call.handed.grad_TD, told=False)
                tensors = player.trains.pop().tensors | player.grads()
                player.layer.zero_grad(set_to_none=True)
            if not any(judge.are_identical([tensors, other]) for other in different[:2]):
                different.append(tensors)
        player.forwards.clear()
        self.deterministic = all(len(different) == 1 for different in sets)
        self.script.repeat([first.number for first in firsts], player.number, REPEATS, bool(player.wanted.names))
        for first, different in zip(firsts, sets, strict=True):
            first.is_done = True
            inputs = first.inputs(self.stage.device, first.handed.grad_TD)
            one = Pass(inputs, {}, first.number, self.script.num_backwards)
            self._judge(player.check(self.stage, [one], different, "train" if player.wanted.names else "forward"))
