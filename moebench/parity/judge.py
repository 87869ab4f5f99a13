"""Is a backend right? Its output and every gradient against the loop path in float64.

Errors are scale-free: ‖a − ref‖ / ‖ref‖ over the whole tensor and over its worst group, a token's row or an expert.
A row's norm is floored at the tensor's root-mean-square row norm, so that cancellation accuses nobody; an expert's is
not. What must be zero (masked tokens, experts without tokens) must be exactly zero. Non-finite never passes.

Budgets are not constants: each is the loop's own rounding at the case's dtype against the same reference, times FACTOR,
with a floor from the dtype's rounding unit and the reduction's length. docs/concepts.md derives them.

FP8 rounds so coarsely that an expert's error in a row hides among rounding where other experts outweigh it. Its output
is therefore looked at by expert too: rounding points anywhere, so that hardly any of it lies along an expert's own
contribution, while a wrong scale lies there whole. That budget comes out at one rounding unit of E4M3, 1/16.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experts.activations import accumulation_dtype
from experts.compute import PARAMETER_NAMES
from moebench.parity.quantization import fp8_product
from moebench.parity.reference import GroupErrors, Tensors, group_errors
from moebench.workload.case import Case
from moebench.workload.inputs import Inputs
from moebench.workload.ranks import ALONE, Ranks

#: A budget is this many times the loop's own error. Two right backends round independently and alike, so that the worst
#: of many rows differs little between them; a fault of 2% in one expert exceeds it in every dtype.
FACTOR = 3.0
#: A row of the routing weights' gradient has only K numbers, too few for an average: its floor is this many units.
WEIGHTS_GRAD_UNITS = 4.0
#: Rounding unit of E4M3, which has three bits after the leading one.
FP8_UNIT = torch.finfo(torch.float8_e4m3fn).eps / 2
#: No budget is larger, whatever the loop's error: a row of zeros, whose error is 1, never passes.
CEILING = 0.5

#: Integers as wide as a float, by its bytes.
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}

#: Requests of up to so many bytes are small to torch's CUDA caching allocator.
SMALL_BLOCK = 1 << 20


@dataclass(frozen=True)
class TensorError:
    """The worst error of one tensor: how large, against which budget, where."""

    tensor: str
    where: str
    error: float
    budget: float

    @property
    def over_budget(self) -> float:
        """Error over budget: at most 1 passes; infinite where a value is not finite, or must be zero and is not."""
        return self.error / self.budget

    def __str__(self) -> str:
        return f"{self.tensor} ({self.where}): error {self.error:.3g}, budget {self.budget:.3g}"


@dataclass(frozen=True)
class ParityVerdict:
    """The worst error of every tensor that was compared."""

    tensor_errors: tuple[TensorError, ...]

    @property
    def worst(self) -> TensorError:
        return max(self.tensor_errors, key=lambda one: one.over_budget)

    @property
    def passed(self) -> bool:
        return self.worst.over_budget <= 1

    @property
    def errors(self) -> dict[str, float]:
        """Error over budget by tensor, the worst where it was looked at in more than one way."""
        ascending = sorted(self.tensor_errors, key=lambda one: one.over_budget)
        worst = {one.tensor: one.over_budget for one in ascending}
        return {one.tensor: worst[one.tensor] for one in self.tensor_errors}


def run_pass(module: nn.Module, inputs: Inputs, mode: str) -> Tensors:
    """One pass of a backend: `output` and, in mode train, the gradients `x.grad`, `weights.grad`, `<parameter>.grad`.

    A gradient that the backend leaves None is absent.
    """
    arguments = inputs.token_mask_T, inputs.indices_TK
    if mode == "forward":
        with torch.no_grad():
            return {"output": module(inputs.x_TD, arguments[0], inputs.weights_TK, arguments[1])}
    x_TD = inputs.x_TD.detach().requires_grad_()
    weights_TK = inputs.weights_TK.detach().requires_grad_()
    module.zero_grad(set_to_none=True)
    output = module(x_TD, arguments[0], weights_TK, arguments[1])
    output.backward(inputs.grad_TD)
    grads = {"x": x_TD.grad, "weights": weights_TK.grad, **_stacked_grads(module)}
    module.zero_grad(set_to_none=True)
    return {"output": output.detach(), **{f"{name}.grad": grad for name, grad in grads.items() if grad is not None}}


def _stacked_grads(module: nn.Module) -> dict[str, Tensor]:
    """Gradients of the module's own experts, stacked: as it says itself, or those of the parameters of these names."""
    own: Callable[[], dict[str, Tensor]] | None = getattr(module, "stacked_grads", None)
    if own is not None:
        return own()
    parameters = {name: getattr(module, name) for name in PARAMETER_NAMES}
    return {name: p.grad for name, p in parameters.items() if p is not None and p.grad is not None}


def check(
    case: Case,
    inputs: Inputs,
    parameters: Mapping[str, Tensor],
    passes: list[Tensors],
    fp8: str | None = None,
    ranks: Ranks = ALONE,
) -> ParityVerdict:
    """Compare every pass of a backend, all alike, with the reference on the same inputs and parameters.

    Inputs, parameters and passes are this rank's; the verdict is over all ranks. `fp8` names the recipe that the
    backend computes in: its rounding is then the budget's. A gradient that is missing, or has another shape or dtype
    than its tensor, is an infinite error.
    """
    malformed = [error for tensors in passes for error in _malformed(case, inputs, parameters, tensors)]
    found = [error for rank in ranks.tell(malformed) for error in rank]
    if not found:
        product = torch.matmul if fp8 is None else fp8_product(fp8)
        errors = group_errors(case, inputs, parameters, passes, product, ranks)
        floor = _floor(case, inputs, fp8)
        floors = {"weights.grad": WEIGHTS_GRAD_UNITS * floor}
        mine = [judge(one, floors.get(one.tensor, floor)) for one in errors]
        found = [_worst_of_ranks(same) for same in zip(*ranks.tell(mine), strict=True)]
    return ParityVerdict(tuple(found))


def _floor(case: Case, inputs: Inputs, fp8: str | None) -> float:
    dtype = inputs.x_TD.dtype
    unit, acc_unit = (torch.finfo(one).eps / 2 for one in (dtype, accumulation_dtype(dtype)))
    most_rows = int((inputs.active_indices_TK.flatten() + 1).bincount(minlength=2)[1:].max())
    longest = max(case.dim, 2 * case.moe_inter_dim, most_rows)
    return (unit if fp8 is None else FP8_UNIT) + acc_unit * math.sqrt(longest)


def _worst_of_ranks(found: Sequence[TensorError]) -> TensorError:
    rank, worst = max(enumerate(found), key=lambda pair: pair[1].over_budget)
    return worst if len(found) == 1 else dataclasses.replace(worst, where=f"rank {rank}, {worst.where}")


def judge(errors: GroupErrors, floor: float) -> TensorError:
    """The worst error of one tensor over all its passes, as a whole and by group."""
    whole = errors.scale_G.square().sum().sqrt()
    budget_of_whole = _budget(_ratios(_norm(errors.loop_G), whole), floor)
    budget_of_group = _budget(_ratios(errors.loop_G, errors.scale_G), floor)
    found = []
    for errors_G in errors.passes_PG:
        by_group_G = _ratios(errors_G, errors.scale_G)
        group = f"{errors.group} {int(by_group_G.argmax())}" if by_group_G.numel() else f"no {errors.group}"
        whole_error = _largest(_ratios(_norm(errors_G), whole))
        found.append(TensorError(errors.tensor, group, _largest(by_group_G), budget_of_group))
        found.append(TensorError(errors.tensor, "whole tensor", whole_error, budget_of_whole))
    return max(found, key=lambda one: one.over_budget)


def _budget(loop_ratios: Tensor, floor: float) -> float:
    return min(CEILING, max(floor, FACTOR * _largest(loop_ratios)))


def _malformed(case: Case, inputs: Inputs, parameters: Mapping[str, Tensor], tensors: Tensors) -> Iterator[TensorError]:
    expected = {"output": inputs.x_TD}
    if case.mode == "train":
        expected |= {"x.grad": inputs.x_TD, "weights.grad": inputs.weights_TK}
        expected |= {f"{name}.grad": parameter for name, parameter in parameters.items()}
    for name, like in expected.items():
        found = tensors.get(name)
        if found is None:
            yield TensorError(name, "is None", math.inf, 1.0)
        elif found.shape != like.shape or found.dtype != like.dtype:
            what = f"is {found.dtype} {list(found.shape)} instead of {like.dtype} {list(like.shape)}"
            yield TensorError(name, what, math.inf, 1.0)


def _ratios(errors: Tensor, scale: Tensor) -> Tensor:
    """Errors over their scale: no error is 0, an error where nothing may be is infinite, and so is NaN."""
    return torch.where(errors == 0, 0.0, errors / scale).nan_to_num(nan=math.inf, posinf=math.inf)


def _largest(ratios: Tensor) -> float:
    return float(ratios.max()) if ratios.numel() else 0.0


def _norm(norms: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


def are_identical(passes: Sequence[Tensors], ranks: Ranks = ALONE) -> bool:
    """Whether all passes hold the same tensors, bit by bit, on every rank. All ranks call it alike."""
    first, *others = passes
    same = all(
        first.keys() == other.keys() and all(_same_bits(first[name], other[name]) for name in first) for other in others
    )
    return all(ranks.tell(same))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    integers = _INTEGERS[a.dtype.itemsize]
    return a.dtype is b.dtype and a.view(integers).equal(b.view(integers))
