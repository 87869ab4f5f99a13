"""Write the steps of a trial as lines of Python that run without moebench.

`moebench.parity.play.play` tells a `Script` each step before it takes it, so that the lines do what it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from moebench.parity.adapters import Lora
from moebench.parity.play import draw
from moebench.parity.space.trial import Trial

#: Statements are joined into lines of at most this many characters.
WIDTH = 140
_CONTEXTS = {
    "no_grad": "torch.no_grad()",
    "inference": "torch.inference_mode()",
    "hooks": "torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone())",
    "autocast": "torch.autocast({device!r}, torch.bfloat16)",
}


@dataclass
class Script:
    """The lines so far. A closed script takes no more lines.

    Layers are called `layer0`, `layer1`, … The call number n reads `x{n}` and `w{n}` and returns `y{n}`. The gradients
    after the backward number n are in `g{n}`, a dict with "x" and "weights". `loop` repeats the calls `repeated`
    in turn. `lora` has the rank and alpha of the layers' adapters, if they have any.
    """

    trial: Trial
    device: str = "cpu"
    lora: Lora | None = None
    lines: list[str] = field(default_factory=list)
    num_backwards: int = 0
    loop: str | None = None
    repeated: tuple[int, ...] = ()
    is_closed: bool = False

    def add(self, *statements: str) -> None:
        """Add statements. A simple statement joins the line before it if both fit into one line."""
        for statement in () if self.is_closed else statements:
            before = self.lines[-1] if self.lines else ""
            joins = before and not before.startswith("with ") and not statement.startswith("with ")
            if joins and len(before) + len(statement) + 2 <= WIDTH:
                self.lines[-1] = f"{before}; {statement}"
            else:
                self.lines.append(statement)

    def build(self, layer: int, trial: Trial, parameters: int, wanted: draw.Wanted) -> None:
        """Build a layer with drawn parameters."""
        own = f"layer{layer}"
        self.add(f"{own} = Layer(MoEConfig({_config(trial)}))")
        self.add(*self._state(layer, parameters), f"{own}.load_state_dict(state)", *draw.layout_lines(self.trial, own))
        if not wanted.is_all:
            trained = "" if self.lora is None else " if n.startswith('lora_')"
            named = f"{own}.named_parameters(){trained}"
            self.add(f"[p.requires_grad_(n in {wanted.parameters!r}) for n, p in {named}]")

    def _state(self, layer: int, parameters: int) -> list[str]:
        shapes = f"shapes = {draw.shapes(self.trial, self.lora)}"
        return [
            shapes,
            f"torch.manual_seed({draw.parameter_seed(self.trial, parameters)})",
            f"state = {draw.new_parameters(self.trial)}",
        ]

    def call(self, number: int, layer: int, lines: Sequence[str], how: str, wanted: draw.Wanted) -> None:
        """Draw inputs with `lines`, and call a layer with them."""
        if self.trial.memory == "poisoned" and self.device == "cpu" and not self.is_closed:
            switch = "torch.use_deterministic_algorithms(True, warn_only=True)"  # fills new memory with NaN
            if not any(switch in line for line in self.lines):
                self.add(switch)
        x, w = f"x{number}", f"w{number}"
        if lines:
            self.add(*lines)
            if how in ("no_grad", "inference"):
                self.add(f"{x}, {w}, dy{number} = x, w, dy")
            else:
                self.add(f"{x}, {w}, dy{number} = x.requires_grad_({wanted.x}), w.requires_grad_({wanted.weights}), dy")
        called = f"layer{layer}({x}, mask, {w}, i)"
        if how in ("checkpoint", "reentrant"):
            options = f"use_reentrant={how == 'reentrant'}"
            called = f"torch.utils.checkpoint.checkpoint(layer{layer}, {x}, mask, {w}, i, {options})"
        if how == "default":
            self.add("torch.set_default_dtype(torch.float64)", f"y{number} = {called}")
            self.add("torch.set_default_dtype(torch.float32)")
        elif how in _CONTEXTS:
            self.add(f"with {_CONTEXTS[how].format(device=self.device)}: y{number} = {called}")
        else:
            self.add(f"y{number} = {called}")

    def other_grad(self, lines: Sequence[str], number: int) -> None:
        """Draw another gradient of a call's output."""
        self.add(*lines, f"dy{number} = dy")

    def backward(self, number: int, retain_graph: bool) -> int:
        """Run a backward of a call, and return the number of the backward."""
        count, self.num_backwards = self.num_backwards, self.num_backwards + 1
        retained = ", retain_graph=True" if retain_graph else ""
        grads = f"g{count} = {{'x': x{number}.grad, 'weights': w{number}.grad}}"
        self.add(f"y{number}.backward(dy{number}{retained})", grads, f"x{number}.grad = w{number}.grad = None")
        return count

    def update(self, layer: int, how: str) -> None:
        """Change every parameter of a layer."""
        own = f"layer{layer}.parameters()"
        match how:
            case "data":
                self.add(f"[p.data.mul_(-0.5) for p in {own}]")
            case "replace":
                new = "torch.nn.Parameter(-0.5 * p.detach(), p.requires_grad)"
                self.add(f"[setattr(layer{layer}, n, {new}) for n, p in list(layer{layer}.named_parameters())]")
            case _:
                self.add(f"with torch.no_grad(): [p.mul_(-0.5) for p in {own}]")

    def load(self, layer: int, parameters: int, how: str, other: object) -> None:
        """Load another state dict into a layer."""
        cast = [f"state = {{n: t.to({other}) for n, t in state.items()}}"] if how == "dtype" else []
        own = f"layer{layer}"
        if how == "assign":  # assigned parameters have the dtype of the state dict
            cast = [f"state = {{n: t.to(torch.{self.trial.params}) for n, t in state.items()}}"]
        if how == "prefix":
            cast.append("state = {f'experts.{n}': t for n, t in state.items()}")
            own = f"torch.nn.ModuleDict({{'experts': {own}}})"
        assign = ", assign=True" if how == "assign" else ""
        self.add(*self._state(layer, parameters), *cast, f"{own}.load_state_dict(state{assign})")

    def save(self, layer: int) -> None:
        """Save the layer's state dict, alone and through a parent module."""
        parent = f"torch.nn.ModuleDict({{'experts': layer{layer}}})"
        self.add(f"saved, whole = layer{layer}.state_dict(), {parent}.state_dict()")

    def grad(self, number: int, layer: int, leaves: Sequence[str]) -> int:
        """Compute the gradients of a call with torch.autograd.grad, and return the number of this backward."""
        count, self.num_backwards = self.num_backwards, self.num_backwards + 1
        own = {"x": f"x{number}", "weights": f"w{number}"}
        tensors = [own.get(name, f"layer{layer}.get_parameter({name!r})") for name in leaves]
        names = ", ".join(map(repr, leaves))
        found = f"torch.autograd.grad(y{number}, [{', '.join(tensors)}], dy{number}, allow_unused=True)"
        self.add(f"g{count} = dict(zip([{names}], {found}))")
        return count

    def repeat(self, numbers: Sequence[int], layer: int, times: int, with_backward: bool) -> None:
        """Repeat two calls in turn. What is asserted of one of them stands in the loop."""
        if self.is_closed:
            return
        sets = ", ".join(f"set{number}" for number in numbers)
        call = f"layer{layer}.zero_grad(); x, mask, w, i, dy = ({sets})[k % 2]; y = layer{layer}(x, mask, w, i)"
        if with_backward:
            grads = f"g{self.num_backwards} = {{'x': x.grad, 'weights': w.grad}}"
            call += f"; y.backward(dy); {grads}; x.grad = w.grad = None"
        self.loop, self.repeated = f"for k in range({times}): {call}", tuple(numbers)

    def rewrite(self, old: int, number: int, lines: Sequence[str]) -> None:
        """Write other inputs into the tensors of an earlier call."""
        self.add(*lines, f"x{old}.data.copy_(x)", f"w{old}.data.copy_(w)", f"x{number}, w{number} = x{old}, w{old}")


def _config(trial: Trial) -> str:
    """Return the arguments of MoEConfig that build the trial's layer."""
    case = trial.case
    shape = ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim")
    fields = {name: getattr(case, name) for name in shape} | {"dtype": trial.params}
    names = ("expert_activation", "expert_bias", "activation_alpha", "activation_limit", "swiglu_limit")
    for name in (*names, "apply_router_weight_after_down"):
        if getattr(case, name) != type(case).model_fields[name].default:
            fields[name] = getattr(case, name)
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())
