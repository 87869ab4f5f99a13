"""Take the steps that change, load or save the parameters of a layer. `Play` takes the other steps."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moebench.parity.judge import TensorError
from moebench.parity.oracle import ADAPTER_NAMES
from moebench.parity.play import draw
from moebench.parity.play.player import Player, Stage, local, same_bits
from moebench.parity.play.script import Script
from moebench.parity.reference import Tensors
from moebench.parity.space.trial import Trial

#: An expert's parameters of at least this many elements are not drawn twice by chance.
NOT_BY_CHANCE = 8


class ParameterSteps:
    """The part of a `Play` that works on parameters.

    `loaded` has the state dicts that layers loaded, each with the values that it must keep.
    """

    trial: Trial
    stage: Stage
    script: Script
    player: Player
    errors: list[TensorError]
    loaded: list[tuple[Tensors, Tensors]]
    num_parameters: int

    def _zero_grad(self, how: str = "") -> None:
        raise NotImplementedError

    def _draw_parameters(self) -> Tensors:
        raise NotImplementedError

    def _update(self, how: str) -> None:
        weights_changed = getattr(self.player.layer, "weights_changed", None)
        if getattr(self.player.layer, "caches_weights", False) and weights_changed is None:
            return  # loading weights renews what it keeps, an update in place does not
        self._zero_grad()
        self.script.update(self.player.number, how)
        with torch.no_grad():
            for name, parameter in list(self.player.layer.named_parameters()):
                if how == "replace":
                    module, _, own = name.rpartition(".")
                    new = nn.Parameter(-0.5 * parameter, requires_grad=parameter.requires_grad)
                    setattr(self.player.layer.get_submodule(module), own, new)
                else:
                    (parameter.data if how == "data" else parameter).mul_(-0.5)
        if weights_changed is not None:
            self.script.add(f"layer{self.player.number}.weights_changed()")
            weights_changed()
        self.player.parameters = {name: -0.5 * tensor for name, tensor in self.player.parameters.items()}

    def _to(self, how: str) -> None:
        """Move the parameters to another dtype."""
        self._zero_grad()
        other = self._other_dtype()
        self.script.add(f"layer{self.player.number}.to({other})")
        self.player.layer.to(other)
        self.player.parameters = {name: tensor.to(other) for name, tensor in self.player.parameters.items()}

    def _other_dtype(self) -> torch.dtype:
        return torch.float32 if self.trial.params == "bfloat16" else torch.bfloat16

    def _load(self, how: str) -> None:
        self._zero_grad()
        self.num_parameters += 1
        state = self._draw_parameters()
        if how == "dtype":
            state = {name: tensor.to(self._other_dtype()) for name, tensor in state.items()}
        new = state
        if how != "assign":  # the parameters keep their dtype
            new = {name: tensor.to(self.player.parameters[name].dtype) for name, tensor in state.items()}
        layer = self.player.layer
        self.script.load(self.player.number, self.num_parameters, how, self._other_dtype())
        given = self.stage.state(state)
        if how == "prefix":
            parent = nn.ModuleDict({"experts": layer})
            parent.load_state_dict({f"experts.{name}": tensor for name, tensor in given.items()})
        else:
            layer.load_state_dict(given, assign=how == "assign")
        if how != "assign":  # what is assigned, a later update changes
            self.loaded.append((given, state))
        self.player.parameters = new

    def _strict(self, how: str) -> None:
        """Load state dicts with a missing and with an unknown name: the layer must refuse both."""
        self._zero_grad()
        right = self.stage.state(self.player.parameters)
        name = next(iter(right))
        wrong = {key: value for key, value in right.items() if key != name}, {**right, "unknown": right[name]}
        for state, what in zip(wrong, (name, "unknown"), strict=True):
            try:
                self.player.layer.load_state_dict(state)
            except RuntimeError:
                error = 0.0
            else:
                error = math.inf
            self.errors.append(TensorError(what, "in a strict load of a wrong state dict", error, 1.0))
        self.player.layer.load_state_dict(right)

    def _save(self, how: str) -> None:
        self.script.save(self.player.number)
        expected = self.player.parameters
        for where, in_parent in (("in the state dict", False), ("in a parent's state dict", True)):
            found = self._state(in_parent)
            for name in sorted({*found, *expected}):
                self.errors.append(same_bits(name, where, found.get(name), expected.get(name)))

    def _state(self, in_parent: bool = False) -> Tensors:
        """Return a copy of the layer's state dict; with `in_parent`, as a parent module saves it."""
        layer = self.player.layer
        saved = nn.ModuleDict({"experts": layer}).state_dict() if in_parent else layer.state_dict()
        prefix = "experts." if in_parent else ""
        return {
            name.removeprefix(prefix) if name.startswith(prefix) else f"{name} without its prefix": local(tensor)
            .detach()
            .clone()
            for name, tensor in saved.items()
        }

    def _init(self, how: str) -> None:
        """Let the layer draw its own parameters. A layer without `init_weights` keeps what it has."""
        init: Callable[[torch.device], None] | None = getattr(self.player.layer, "init_weights", None)
        if init is None:
            return
        self._zero_grad()
        seed = draw.parameter_seed(self.trial, self.num_parameters) + self.stage.rank
        call = f"layer{self.player.number}.init_weights(torch.device({self.script.device!r}))"
        self.script.add(f"torch.manual_seed({seed})", call)
        with draw.generators_kept(self.stage.device):
            draw.seed(self.stage.device, seed)
            init(self.stage.device)
        found = self._state()
        for name, tensor in self.player.parameters.items():
            drawn = found.get(name)
            if drawn is not None and tensor.shape != drawn.shape:
                raise ValueError(f"init_weights gave {name} the shape {list(drawn.shape)}")
            error = 0.0 if drawn is not None and self._is_drawn(name, drawn) else math.inf
            self.errors.append(TensorError(name, "after init_weights", error, 1.0))
        self.player.parameters = {name: found.get(name, tensor) for name, tensor in self.player.parameters.items()}

    def _is_drawn(self, name: str, stacked: Tensor) -> bool:
        """Whether biases and B of adapters are zeros, and no two experts of any rank have the same projection or A."""
        if "bias" in name or (name in ADAPTER_NAMES and name.endswith("_B")):
            return not stacked.any()
        experts = [one.cpu().flatten().view(torch.uint8).numpy().tobytes() for one in stacked]
        everywhere = [one for rank in self.stage.ranks.tell(experts) for one in rank]
        return bool(stacked.isfinite().all()) and (
            stacked[0].numel() < NOT_BY_CHANCE or len(set(everywhere)) == len(everywhere)
        )
