"""Draw the tensors of a trial. They come from lines of Python that run without moebench.

`moebench.parity.play.listing` prints the same lines, so that a counterexample has the same values outside of moebench.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebench.parity.adapters import Lora, adapter_shapes
from moebench.parity.oracle import ADAPTERS, trained
from moebench.parity.space.trial import Trial
from moebench.workload.inputs import Inputs

#: Each set of inputs has a seed of its own, this many apart. So has each set of parameters.
SEEDS_APART = 1000
PARAMETER_SEED = 500

Shapes = dict[str, tuple[int, ...]]

_NAN = 'float("nan")'
_FLOAT64 = ", dtype=torch.float64"  # values that float32 does not hold
_CHOICES = {
    "some-dropped": "i[torch.rand(i.shape) < 0.3] = -1",
    "first-dropped": "i[:, 0] = -1",
    "token-dropped": "i[-1:] = -1",
    "all-dropped": "i[:] = -1",
    "duplicates": "i[:, -1] = i[:, 0]",
    "both": "i[:, -1] = i[:, 0]; i[torch.rand(i.shape) < 0.3] = -1",
}
_MASKS = {
    "some": "mask[torch.rand(len(mask)) < 0.4] = False",
    "none-kept": "mask[:] = False",
    "first-masked": "mask[:1] = False",
    "last-masked": "mask[-1:] = False",
    "only-first": "mask[1:] = False",
    "only-last": "mask[:-1] = False",
}
_WEIGHTS = {
    "sum-to-one": "w = w / w.sum(1, keepdim=True)",
    "some-zero": "w[torch.rand(w.shape) < 0.3] = 0",
    "all-zero": "w = 0 * w",
    "negative": "w = 2 * w - 1.5",
    "to-eight": "w = 8 * w",
    "small": "w = 1e-3 * w",
    "near-one": "w[:] = 1; w[len(w) // 2:] = 0.9999",
}
_GRAD_SCALES = {"large": "1e5", "tiny": "1e-9"}
#: Layout -> the same values t in that layout. What lies between and around them in memory is `{fill}`.
_LAYOUTS = {
    "strided": "torch.stack(({t}, torch.full_like({t}, {fill})), -1)[..., 0]",
    "columns": "{t}.t().contiguous().t()",
    "sliced": "torch.nn.functional.pad({t}, (3, 3, 1, 1), value={fill})[1:-1, 3:-3]",
    "misaligned": "torch.cat(({t}.flatten()[:0].new_zeros(1), {t}.flatten()))[1:].view({t}.shape)",
    "expanded": "{t}[:1].expand({t}.shape)",
}
_PARAMETER_LAYOUTS = {
    "columns": "p.data.mT.contiguous().mT",
    "misaligned": "torch.cat((p.data.flatten()[:1], p.data.flatten()))[1:].view(p.shape)",
}


def input_lines(trial: Trial, number: int = 0, tokens: int | None = None) -> list[str]:
    """Return the lines that draw x, w, i, mask and dy: a trial's inputs number `number`, with `tokens` tokens."""
    num_tokens = trial.num_tokens if tokens is None else tokens
    rows, shape = f"{num_tokens}, {trial.dim}", f"{num_tokens}, {trial.n_activated_experts}"
    rows += _FLOAT64 if trial.dtype == "float64" else ""
    weights = shape + (_FLOAT64 if trial.weights_dtype == "float64" else "")
    return [
        f"torch.manual_seed({trial.seed + SEEDS_APART * number})",
        f"x, w, dy = torch.randn({rows}), torch.rand({weights}), torch.randn({rows})",
        f"i, mask = {_routing(trial, num_tokens)}, torch.ones({num_tokens}, dtype=torch.bool)",
        *_changes(trial, num_tokens),
    ]


def _routing(trial: Trial, num_tokens: int) -> str:
    experts, chosen = trial.n_routed_experts, trial.n_activated_experts
    scores = f"torch.rand({num_tokens}, {experts})"
    ramp = f"torch.arange({experts})"
    match trial.routing:
        case "uniform":
            return f"{scores}.argsort(1)[:, :{chosen}].contiguous()"
        case "first":
            return f"torch.arange({chosen}).repeat({num_tokens}, 1)"
        case "last":
            return f"torch.arange({experts - chosen}, {experts}).repeat({num_tokens}, 1)"
        case "one-hot":
            return f"torch.randperm({experts})[:{chosen}].repeat({num_tokens}, 1)"
        case "zipf":
            return f"({scores}.log() * (1 + {ramp})).argsort(1, descending=True)[:, :{chosen}].contiguous()"
        case "half-empty":
            return f"({scores} + ({ramp} % 2)).argsort(1)[:, :{chosen}].contiguous()"
        case _:  # blocks: neighbouring tokens choose the same experts
            at = f"(torch.arange({num_tokens}) * {experts} // {max(num_tokens, 1)})[:, None]"
            return f"({at} + torch.arange({chosen})) % {experts}"


def _changes(trial: Trial, num_tokens: int) -> Iterator[str]:
    """Yield the lines that change values, then dtypes, then layouts.

    The rows of an expanded tensor are all its first row, so that no single value of it can be NaN.
    """
    if trial.choices in _CHOICES:
        yield _CHOICES[trial.choices]
    if trial.indices_layout == "expanded" and num_tokens:
        yield "i = i[:1].expand(i.shape)"
    if trial.mask in _MASKS:
        yield _MASKS[trial.mask]
    if trial.weights in _WEIGHTS:
        yield _WEIGHTS[trial.weights]
    if trial.x_scale != 1:
        yield f"x = {trial.x_scale:g} * x"
    if trial.grad == "halves":
        yield f"dy[:] = 1; dy[{num_tokens} // 2:] = -1"
    if trial.grad in _GRAD_SCALES:
        yield f"dy = {_GRAD_SCALES[trial.grad]} * dy"
    if trial.unused_weights == "nan" and trial.weights_layout != "expanded":
        yield f"w[(i < 0) | ~mask[:, None]] = {_NAN}"
    if trial.x_layout != "expanded" and trial.mask != "all-kept":
        yield f"x[~mask] = {_NAN}"
    if trial.dtype not in ("float32", "float64"):
        yield f"x, dy = x.to(torch.{trial.dtype}), dy.to(torch.{trial.dtype})"
    if trial.weights_dtype not in ("float32", "float64"):
        yield f"w = w.to(torch.{trial.weights_dtype})"
    if trial.index_dtype != "int64":
        yield f"i = i.to(torch.{trial.index_dtype})"
    layouts = {
        "x": (trial.x_layout, _NAN),
        "w": (trial.weights_layout, _NAN),
        "i": (trial.indices_layout, "0"),
        "mask": (trial.mask_layout, "True"),
        "dy": (trial.grad_layout, _NAN),
    }
    for name, (layout, fill) in layouts.items():
        if layout in _LAYOUTS and num_tokens:
            yield f"{name} = {_LAYOUTS[layout].format(t=name, fill=fill)}"


def run_lines(lines: list[str], device: torch.device) -> Inputs:
    """Run the lines of `input_lines` on a device, and return what they draw. Torch's generators stay as they were."""
    names: dict[str, Any] = {"torch": torch, "seed": partial(seed, device)}
    with generators_kept(device), device:
        exec("\n".join(lines).replace("torch.manual_seed", "seed"), names)
    return Inputs(names["x"], names["mask"], names["w"], names["i"], names["dy"])


def seed(device: torch.device, number: int) -> None:
    """Seed the generators that draw on the device. They draw what they draw after `torch.manual_seed`.

    On a CPU, `torch.manual_seed` imports torch's compiler, which takes a second, and each call formats the stack for
    every kind of GPU that is not there.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Within this context, draws do not change torch's random generators for what comes later."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def new_parameters(trial: Trial) -> str:
    """Return the expression that draws parameters for the shapes in `shapes`."""
    drawn = f"torch.randn(s{_FLOAT64 if trial.params == 'float64' else ''})"
    return f"{{n: {drawn} / (s[1] ** 0.5 if len(s) == 3 else 2) for n, s in shapes.items()}}"


def parameters(trial: Trial, shapes: Shapes, number: int, device: torch.device) -> dict[str, Tensor]:
    """Return a trial's parameters number `number` by name, in the parameters' dtype.

    Projections are drawn from N(0, 1/fan-in), and biases from N(0, 1/4).
    """
    names: dict[str, Any] = {"torch": torch, "shapes": shapes}
    with generators_kept(device), device:
        seed(device, parameter_seed(trial, number))
        drawn = eval(new_parameters(trial), names)
    return {name: tensor.to(getattr(torch, trial.params)) for name, tensor in drawn.items()}


def parameter_seed(trial: Trial, number: int) -> int:
    """Return the seed of a trial's parameters number `number`."""
    return trial.seed + PARAMETER_SEED + SEEDS_APART * number


def shapes(trial: Trial, lora: Lora | None = None) -> Shapes:
    """Return the shapes of the parameters of a trial's layer by name, in the order of its state dict.

    Adapters come last.
    """
    width = trial.moe_inter_dim * (1 if trial.expert_activation == "relu2" else 2)
    experts, dim, inter = trial.n_routed_experts, trial.dim, trial.moe_inter_dim
    found: Shapes = {"gate_and_up_projs": (experts, dim, width), "down_projs": (experts, inter, dim)}
    if trial.expert_bias:
        found |= {"gate_up_proj_bias": (experts, width), "down_proj_bias": (experts, dim)}
    return found if lora is None else found | adapter_shapes(found, lora.rank)


def laid_out(trial: Trial, p: Tensor) -> Tensor:
    """Return a parameter's values in the trial's layout of parameters."""
    line = _PARAMETER_LAYOUTS.get(trial.parameter_layout)
    laid: Tensor = p.data if line is None else eval(line, {"torch": torch, "p": p})
    return laid


def layout_lines(trial: Trial, layer: str) -> list[str]:
    """Return the line that gives the parameters of a layer their layout; none if they keep it."""
    line = _PARAMETER_LAYOUTS.get(trial.parameter_layout)
    return [] if line is None else [f"[setattr(p, 'data', {line}) for p in {layer}.parameters()]"]


@dataclass(frozen=True)
class Wanted:
    """The tensors whose gradients a trial wants."""

    x: bool
    weights: bool
    parameters: tuple[str, ...]
    is_all: bool

    @property
    def names(self) -> tuple[str, ...]:
        return ("x",) * self.x + ("weights",) * self.weights + self.parameters


def wanted(trial: Trial, names: tuple[str, ...], is_last_rank: bool = True) -> Wanted:
    """Return the gradients that a trial wants, of a layer with the parameters `names`.

    Adapters stand for the projections beside them, whose gradients nobody gets.
    """
    kind, names = trial.wanted, trained(names)
    of = {
        projection: tuple(one for one in names if one in (projection, *pair)) for projection, pair in ADAPTERS.items()
    }
    if kind == "parameters-on-last":
        kind = "parameters" if is_last_rank else "all"
    chosen = {
        **of,
        "biases": tuple(one for one in names if one.endswith("bias")),
        "x": (),
        "weights": (),
        "x+weights": (),
        "nothing": (),
    }.get(kind, names)
    x = kind in ("all", "x", "x+weights", "all-but-weights")
    weights = kind in ("all", "weights", "x+weights", "all-but-x")
    return Wanted(x, weights, chosen, kind == "all")
