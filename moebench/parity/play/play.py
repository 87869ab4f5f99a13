"""Play a trial: take its steps with a layer, and compare all that the layer computes with the oracle."""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moebench.parity.judge import ParityVerdict, TensorError
from moebench.parity.oracle import trained
from moebench.parity.play import draw
from moebench.parity.play.backwards import BackwardSteps
from moebench.parity.play.parameters import ParameterSteps
from moebench.parity.play.player import Call, Compared, Player, Stage, local, same_bits
from moebench.parity.play.script import Script
from moebench.parity.poison import poisoned
from moebench.parity.reference import Tensors
from moebench.parity.space.trial import Trial
from moebench.workload.inputs import Inputs

#: The inputs of ranks are this many numbers apart.
INPUTS_OF_RANK = 100


class Play(BackwardSteps, ParameterSteps):
    """A trial that is being played. Its methods `_call`, `_backward` and so on take the steps of `STEPS`."""

    def __init__(self, trial: Trial, stage: Stage) -> None:
        self.trial, self.stage = trial, stage
        self.num_inputs = self.num_parameters = 0
        self.tokens = _tokens_of_rank(trial, stage.rank)
        self.num_calls = 0
        self.deterministic: bool | None = None
        self.errors: list[TensorError] = []
        self.script = Script(trial, stage.device.type, stage.lora)
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

    # inputs

    def _tokens(self, how: str) -> None:
        self.num_inputs += 1
        if how == "in-place":
            self._rewrite()
        else:
            self.tokens = _changed_tokens(self.tokens, how)

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
        shapes = draw.shapes(self.trial, self.stage.lora)
        return self.stage.share(draw.parameters(self.trial, shapes, self.num_parameters, self.stage.device))

    def _new_player(self, trial: Trial) -> Player:
        number = len(self.players)
        names = tuple(draw.shapes(trial, self.stage.lora))
        wanted = draw.wanted(trial, names, is_last_rank=self.stage.rank == trial.ep_size - 1)
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
            if name in parameters and name not in trained(parameters):
                continue  # the layer itself must freeze the weights beside its adapters
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


def most_tokens(trial: Trial) -> int:
    """Return the largest number of tokens of any call on any rank, at least 1."""
    counts = [_tokens_of_rank(trial, rank) for rank in range(trial.ep_size)]
    most = max(1, *counts)
    for step in trial.steps:
        name, _, how = step.partition(":")
        if name == "tokens":
            counts = [_changed_tokens(count, how) for count in counts]
            most = max(most, *counts)
    return most


def _changed_tokens(num_tokens: int, how: str) -> int:
    return {"more": 2 * num_tokens + 3, "fewer": num_tokens // 3}.get(how, num_tokens)


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
