"""Play a trial: take its steps with a layer, and compare all that the layer computes with the oracle."""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moebench.parity import judge
from moebench.parity.judge import ParityVerdict, TensorError
from moebench.parity.play import draw
from moebench.parity.play.parameters import ParameterSteps
from moebench.parity.play.player import Call, Compared, Pass, Player, Stage, local, same_bits
from moebench.parity.play.script import Script
from moebench.parity.poison import poisoned
from moebench.parity.reference import Tensors
from moebench.parity.space.trial import Trial
from moebench.workload.inputs import Inputs

#: With this many calls, a fault in one of 50 calls is met with a probability of 0.99.
REPEATS = 230
#: The inputs of ranks are this many numbers apart, and the second gradient of `backward:twice` this many.
INPUTS_OF_RANK, OTHER_GRAD = 100, 50


class Play(ParameterSteps):
    """A trial that is being played. Its methods `_call`, `_backward` and so on take the steps of `STEPS`."""

    def __init__(self, trial: Trial, stage: Stage) -> None:
        self.trial, self.stage = trial, stage
        self.num_inputs = self.num_parameters = 0
        self.tokens = _tokens_of_rank(trial, stage.rank)
        self.num_calls = 0
        self.deterministic: bool | None = None
        self.errors: list[TensorError] = []
        self.script = Script(trial, stage.device.type)
        self.failed: Compared | None = None
        self.changed: Call | None = None
        self.players: list[Player] = []
        self.loaded: list[tuple[Tensors, Tensors]] = []
        self.player: Player
        self.other: Player | None = None

    def run(self) -> ParityVerdict:
        """Take all steps, and return the verdict. Raises the errors of the layer, and Unfit as `judge.check` does."""
        self.player = self._new_player(self.trial)
        for step in self.trial.steps:
            name, _, how = step.partition(":")
            getattr(self, f"_{name}")(how)
        for player in self.players:
            self._compare(player)
            for call, error in player.look_back(self.stage.device):
                self.errors.append(error)
                if self.changed is None and error.over_budget > 1:
                    self.changed = call
        for given, values in self.loaded:
            for name, tensor in given.items():
                self.errors.append(
                    same_bits(name, "in the state dict that was loaded", local(tensor), local(values[name]))
                )
        return ParityVerdict(tuple(self.errors) or (TensorError("output", "not compared", 0.0, 1.0),))

    def _compare(self, player: Player) -> None:
        for compared in player.compare(self.stage):
            self._judge(compared)

    def _judge(self, compared: Compared) -> None:
        self.errors += compared.errors
        if self.failed is None and any(one.over_budget > 1 for one in compared.errors):
            self.failed = compared
            self.script.is_closed = True

    # calls

    def _call(self, how: str) -> Call:
        lines = self._lines(self.num_inputs, self.tokens)
        return self._call_on(draw.run_lines(lines, self.stage.device), lines, how)

    def _lines(self, number: int, tokens: int) -> list[str]:
        """Return the lines that draw this rank's inputs number `number`."""
        return draw.input_lines(self.trial, number + INPUTS_OF_RANK * self.stage.rank, tokens)

    def _call_on(self, handed: Inputs, lines: list[str], how: str, is_new: bool = True) -> Call:
        player, wanted = self.player, self.player.wanted
        number, self.num_calls = self.num_calls, self.num_calls + 1
        if is_new:
            self.script.call(number, player.number, lines, how, wanted)
        with_graph = how not in ("no_grad", "inference")
        if with_graph:
            handed.x_TD.requires_grad_(wanted.x)
            handed.weights_TK.requires_grad_(wanted.weights)
        arguments = handed.x_TD, handed.token_mask_T, handed.weights_TK, handed.indices_TK
        with self._memory(), _context(how, self.stage.device):
            if how in ("checkpoint", "reentrant"):  # the reentrant kind needs an input that requires a gradient
                reentrant = how == "reentrant" and (wanted.x or wanted.weights)
                output = checkpoint(player.layer, *arguments, use_reentrant=reentrant)
            else:
                output = player.layer(*arguments)
        if not isinstance(output, Tensor):
            raise TypeError(f"the layer returned {type(output).__name__}, not a Tensor")
        in_graph = with_graph and bool(wanted.names)
        call = Call(number, handed, lines, output, output.detach().clone(), in_graph, how == "autocast")
        player.calls.append(call)
        if not in_graph:
            player.finish(call, self.stage.device)
        return call

    def _eval(self, how: str) -> None:
        self.script.add(f"layer{self.player.number}.eval()")
        self.player.layer.eval()

    def _train(self, how: str) -> None:
        self.script.add(f"layer{self.player.number}.train()")
        self.player.layer.train()

    def _memory(self) -> AbstractContextManager[None]:
        return poisoned(self.stage.device) if self.trial.memory == "poisoned" else nullcontext()

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

    # inputs

    def _tokens(self, how: str) -> None:
        self.num_inputs += 1
        if how == "in-place":
            self._rewrite()
        elif how != "other":
            self.tokens = 2 * self.tokens + 3 if how == "more" else self.tokens // 3

    def _rewrite(self) -> None:
        """Write other values into the tensors of the last call that is done, and call the layer with them."""
        done = [call for call in self.player.calls if call.is_done]
        layouts = (self.trial.x_layout, self.trial.weights_layout, self.trial.indices_layout)
        if not done or "expanded" in layouts:  # an expanded tensor cannot be written to
            return
        old = done[-1].handed
        lines = self._lines(self.num_inputs, old.x_TD.shape[0])
        new = draw.run_lines(lines, self.stage.device)
        with torch.no_grad():
            for name in ("x_TD", "weights_TK", "indices_TK", "token_mask_T"):
                getattr(old, name).copy_(getattr(new, name))
        for call in self.player.calls:
            call.rewritten = call.rewritten or call.handed.x_TD is old.x_TD
        self.script.rewrite(done[-1].number, self.num_calls, lines)
        self._call_on(dataclasses.replace(old, grad_TD=new.grad_TD), lines, "no_grad", is_new=False)
        self.script.call(self.num_calls - 1, self.player.number, [], "no_grad", self.player.wanted)

    # layers and gradients

    def _zero_grad(self, how: str = "") -> None:
        self._compare(self.player)
        self.player.layer.zero_grad(set_to_none=True)
        if self.script.num_backwards:
            self.script.add(f"layer{self.player.number}.zero_grad()")

    def _draw_parameters(self) -> Tensors:
        """Return this rank's share of new parameters."""
        shapes = draw.shapes(self.trial)
        return self.stage.share(draw.parameters(self.trial, shapes, self.num_parameters, self.stage.device))

    def _new_player(self, trial: Trial) -> Player:
        number = len(self.players)
        wanted = draw.wanted(trial, tuple(draw.shapes(trial)), is_last_rank=self.stage.rank == trial.ep_size - 1)
        self.script.build(number, trial, self.num_parameters, wanted)
        layer = self.stage.build(trial)
        parameters = self._draw_parameters()
        layer.load_state_dict(self.stage.state(parameters))
        named = dict(layer.named_parameters())
        is_stacked = parameters.keys() <= named.keys()
        if is_stacked and self.stage.ranks.mesh is None:
            for name in parameters:
                named[name].data = draw.laid_out(trial, named[name])
        if not is_stacked and wanted.parameters:  # parameters of its own have gradients all together
            wanted = dataclasses.replace(wanted, parameters=tuple(parameters))
        for name, parameter in named.items():
            parameter.requires_grad_(name in wanted.parameters or (name not in parameters and bool(wanted.parameters)))
        player = Player(number, trial, layer, parameters, wanted)
        self.players.append(player)
        return player

    def _copy(self, how: str) -> None:
        self._zero_grad()
        own = self.player
        twin = Player(len(self.players), own.trial, copy.deepcopy(own.layer), own.parameters, own.wanted)
        self.script.add(f"layer{twin.number} = copy.deepcopy(layer{own.number})")
        self.players.append(twin)
        self._go_to(twin)

    def _second(self, how: str) -> None:
        self.num_parameters += 1
        self._go_to(self._new_player(_other_configuration(self.trial)))

    def _go_to(self, player: Player) -> None:
        self.other, self.player = self.player, player

    def _switch(self, how: str) -> None:
        if self.other is not None:
            self.player, self.other = self.other, self.player


def _other_configuration(trial: Trial) -> Trial:
    """Return the trial with another limit, and with the routing weight at the other side of the down projection."""
    limit = {0.0: 0.0, 0.75: 7.0}.get(trial.limit, 0.75)
    return dataclasses.replace(
        trial, limit=limit, apply_router_weight_after_down=not trial.apply_router_weight_after_down
    )


def _tokens_of_rank(trial: Trial, rank: int) -> int:
    empty = {"last-empty": trial.ep_size - 1, "first-empty": 0}.get(trial.rank_load)
    if trial.rank_load == "uneven":
        return trial.num_tokens * (rank + 1) // trial.ep_size
    return 0 if rank == empty else trial.num_tokens


def _context(how: str, device: torch.device) -> AbstractContextManager[object]:
    match how:
        case "no_grad":
            return torch.no_grad()
        case "inference":
            return torch.inference_mode()
        case "hooks":
            return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)
        case "autocast":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        case "default":
            return _default_dtype()
        case _:
            return nullcontext()


@contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _pack(saved: Tensor) -> tuple[torch.device, Tensor]:
    return saved.device, saved.detach().to("cpu", copy=True)


def _unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, values = packed
    return values.to(device, copy=True)
