"""Write a counterexample as a few lines of Python that show it without moebench."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.parity.judge import TensorError
from moebench.parity.oracle import ADAPTER_NAMES
from moebench.parity.play.play import Play
from moebench.parity.play.player import Compared
from moebench.parity.reference import exact_pass


def listing(backend: str, play: Play) -> list[str]:
    """Return the lines for a trial that was played and failed. The last line raises AssertionError, or a line before it
    raises the error of the layer.
    """
    found = [shown for shown in _assertions(play) if shown is not None][:1]
    lines = [*_header(backend, play), *play.script.lines]
    if play.script.loop is not None and found:
        return [*lines, f"{play.script.loop}; {_in_loop(found[0], play)}"]
    return lines + (found or _reading_of_grads(play))


def _reading_of_grads(play: Play) -> list[str]:
    """Return the line that asks the layer for its gradients if the layer raises an error then."""
    if not play.players:  # the layer could not be built
        return []
    own: Callable[[], object] | None = getattr(play.player.layer, "stacked_grads", None)
    try:
        if own is not None:
            own()
    except Exception:
        return [f"layer{play.player.number}.stacked_grads()"]
    return []


def _in_loop(assertion: str, play: Play) -> str:
    """Return the assertion of a call that is repeated in turn with another one."""
    assert play.failed is not None
    call = play.failed.passes[0].call
    turn = play.script.repeated.index(call)
    return assertion.replace(f"y{call}[", "y[").replace("assert ", f"assert k % 2 != {turn} or ", 1)


def _header(backend: str, play: Play) -> list[str]:
    device = [f"torch.set_default_device({play.script.device!r})"] if play.script.device != "cpu" else []
    if ":" in backend:
        module, _, attribute = backend.partition(":")
        found = ["import copy; import torch; import torch.utils.checkpoint; from experts import MoEConfig"]
        return [*found, f"from {module} import {attribute} as Layer", *device]
    return [
        "import copy; import torch; import torch.utils.checkpoint; from experts import MoEConfig, get_backend",
        f"Layer = get_backend({backend!r}).build",
        *device,
    ]


def _assertions(play: Play) -> list[str | None]:
    worst = max(play.errors, key=lambda one: one.over_budget, default=None)
    if play.failed is not None:
        return [_of_values(play.failed, play)]
    if worst is None or worst.over_budget <= 1:
        return []
    return [_of_bits(worst, play)]


# values


@dataclass(frozen=True)
class _Element:
    """The element of a tensor that is most wrong: the expression that names it, its value, and the right value."""

    expression: str
    found: float
    right: float

    @property
    def assertion(self) -> str:
        """An assertion that fails by the error that was found, and passes if the error is less than half of it."""
        error = abs(self.found - self.right)
        allowed = f"{error / 2:.3g}" if math.isfinite(error) else "1e-3"
        what = f"f'{{v}} should be {self.right:.6g}'"
        return f"v = {self.expression}.item(); assert abs(v - {self.right!r}) <= {allowed}, {what}"


def _of_values(compared: Compared, play: Play) -> str | None:
    worst = max(compared.errors, key=lambda one: one.over_budget)
    name = worst.tensor
    if worst.where.startswith("is "):
        return _of_form(worst, compared, play)
    stage = play.stage
    exact = exact_pass(compared.case, compared.inputs, compared.parameters, stage.ranks, stage.lora_scale)[name]
    best: tuple[float, Tensor, Tensor] | None = None
    for tensors in compared.tensors:
        error = (tensors[name].double() - exact).abs().nan_to_num(nan=math.inf)
        if error.numel() and (best is None or float(error.max()) > best[0]):
            best = float(error.max()), error, tensors[name]
    if best is None:
        return None
    _, error, tensor = best
    index = [int(one) for one in torch.unravel_index(error.argmax(), error.shape)]
    right, found = float(exact[tuple(index)]), float(tensor[tuple(index)])
    return _Element(_expression(name, index, compared), found, right).assertion


def _expression(name: str, index: list[int], compared: Compared) -> str:
    """Return the Python expression of an element of a compared tensor, which has the rows of several passes."""
    if name not in ("output", "x.grad", "weights.grad"):
        return f"{_parameter_grad(name, compared)}{_at(index)}"
    row = index[0]
    for one in compared.passes:
        rows = one.inputs.x_TD.shape[0]
        if row < rows:
            return f"{_tensor(name, one.call, one.backward)}{_at([row, *index[1:]])}"
        row -= rows
    raise AssertionError("a row of no pass")


def _parameter_grad(name: str, compared: Compared) -> str:
    own, parameter = f"layer{compared.player.number}", name.removesuffix(".grad")
    if hasattr(compared.player.layer, "stacked_grads"):
        return f"{own}.stacked_grads().get({parameter!r})"
    return f"{own}.{parameter}.grad"


def _tensor(name: str, call: int, backward: int | None) -> str:
    return f"y{call}" if name == "output" else f"g{backward or 0}[{name.removesuffix('.grad')!r}]"


def _at(index: list[int]) -> str:
    return f"[{', '.join(map(str, index))}]"


def _of_form(worst: TensorError, compared: Compared, play: Play) -> str:
    """Return the assertion that a tensor is there, is not there, or has its dtype and shape."""
    one = compared.passes[-1]
    name = worst.tensor
    tensor = (
        _tensor(name, one.call, one.backward)
        if name in ("output", "x.grad", "weights.grad")
        else _parameter_grad(name, compared)
    )
    if worst.where == "is None":
        return f"assert {tensor} is not None, 'there is no {name}'"
    if "nobody wanted" in worst.where:
        return f"assert {tensor} is None, 'nobody wanted {name}'"
    like = {"output": one.inputs.x_TD, "x.grad": one.inputs.x_TD, "weights.grad": one.inputs.weights_TK}.get(name)
    like = compared.parameters[name.removesuffix(".grad")] if like is None else like
    return f"assert ({tensor}.dtype, tuple({tensor}.shape)) == ({like.dtype}, {tuple(like.shape)}), {tensor}.dtype"


# bits


def _of_bits(worst: TensorError, play: Play) -> str | None:
    """Return the assertion that a tensor was not changed, and add the line that keeps its values to the script."""
    layer = f"layer{play.player.number}"
    if worst.where in ("in the state dict", "in a parent's state dict"):
        found = "saved" if worst.where == "in the state dict" else "{n[8:]: t for n, t in whole.items()}"
        right = "{n.removeprefix('experts.'): t for n, t in state.items()}"
        same = f"found[k].equal(right[k].to(found[k].dtype)) for k in [{worst.tensor!r}]"
        return f"found, right = {found}, {right}; assert found.keys() == right.keys() and all({same})"
    if worst.where == "in the state dict that was loaded":
        return f"assert not any(p.data_ptr() == t.data_ptr() for p in {layer}.parameters() for t in state.values())"
    if worst.where.startswith("in a strict load"):
        wrong = "{**state, 'unknown': next(iter(state.values()))}"
        if worst.tensor != "unknown":
            wrong = f"{{n: t for n, t in state.items() if n != {worst.tensor!r}}}"
        return f"assert {layer}.load_state_dict({wrong}) is None, 'a wrong state dict was loaded'"
    if worst.where == "written by autograd.grad":
        name = worst.tensor.removesuffix(".grad")
        return f"assert {layer}.get_parameter({name!r}).grad is None, 'autograd.grad wrote it'"
    if worst.where == "after init_weights":
        stacked = f"{layer}.state_dict()[{worst.tensor!r}]"
        if "bias" in worst.tensor or (worst.tensor in ADAPTER_NAMES and worst.tensor.endswith("_B")):
            return f"assert not {stacked}.any()"
        return f"assert {stacked}.isfinite().all() and len({stacked}.flatten(1).unique(dim=0)) == len({stacked})"
    if play.changed is None:
        return None
    number, name = play.changed.number, worst.tensor
    own = {"output": f"y{number}", "x_TD": f"x{number}", "weights_TK": f"w{number}", "grad_TD": f"dy{number}"}
    tensor = own.get(name, {"indices_TK": "i", "token_mask_T": "mask"}.get(name, name))
    kept = f"kept = {tensor}.detach().clone()"
    lines = play.script.lines
    calls = [re.search(rf"\by{number} = ", line) for line in lines]
    at, called = next((place, call.start()) for place, call in enumerate(calls) if call is not None)
    if name == "output":
        lines.insert(at + 1, kept)
    elif lines[at].startswith("with "):
        lines.insert(at, kept)
    else:
        lines[at] = f"{lines[at][:called]}{kept}; {lines[at][called:]}"
    return f"assert kept.nan_to_num(7).equal({tensor}.detach().nan_to_num(7)), '{name} was changed'"
