"""Decide whether a backend is right: compare its output and every gradient with the oracle in float64.

Errors are scale-free: ‖a − ref‖ / ‖ref‖ over the whole tensor and over its worst group. A group is the row of one token
or one expert. The norm of a reference row is at least the root mean square of the tensor's row norms, so that a row
that is small by cancellation does not fail a right backend. The norm of an expert's gradient has no such floor. Rows of
masked tokens and gradients of experts without tokens must be exactly zero. A value that is not finite never passes.

Budgets are not constants. The oracle runs again with the rounding of the case's dtype, and its errors against the
float64 run are what rounding costs. The budget is FACTOR times the largest of these errors, with a floor from the
dtype's rounding unit and the reduction's length. docs/concepts.md derives the budgets. Nothing in a budget comes from
the code under test.

FP8 rounds so coarsely that one expert's error can hide in a row to which other experts add more. The output of an FP8
backend is therefore also compared by expert. Only the part of the error that lies along the direction of the expert's
own contribution counts in this comparison. Rounding errors point in all directions, so only a small part of a rounding
error lies along this direction. The error of a wrong scale lies along this direction completely. The budget of the
comparison by expert comes out at one rounding unit of E4M3, 1/16.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.parity.block import Around
from moebench.parity.oracle import trained, wide
from moebench.parity.quantization import fp8_product, rows_in_fp8
from moebench.parity.reference import GroupErrors, Tensors, group_errors
from moebench.parity.rounding import REFERENCE_ROUNDS
from moebench.workload.case import Case
from moebench.workload.inputs import Inputs
from moebench.workload.models import EXPERTS
from moebench.workload.ranks import ALONE, Ranks

#: A budget is this many times the largest error of the oracle's runs that round. The rounding errors of two right
#: backends are independent and of the same size, so their worst rows differ little.
FACTOR = 3.0
#: The budget's floor for the routing weights' gradient is this many times the floor of other tensors, because a row of
#: this gradient has only K numbers, too few for an average.
WEIGHTS_GRAD_UNITS = 4.0
#: A gradient that is stored in a coarser dtype than the computation's is rounded there several times, because autograd
#: adds up the gradients of several uses.
STORED_UNITS = 4.0
#: The rounding unit of E4M3, which has three bits after the leading one.
FP8_UNIT = torch.finfo(torch.float8_e4m3fn).eps / 2
#: No budget is larger than this. A row of zeros has error 1 and therefore never passes.
CEILING = 0.5

#: The integer dtype that is as wide as a float, by its number of bytes.
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}

#: torch's CUDA caching allocator treats requests of up to this many bytes as small.
SMALL_BLOCK = 1 << 20


@dataclass(frozen=True)
class TensorError:
    """The worst error of one tensor: its size, its budget, and where it is."""

    tensor: str
    where: str
    error: float
    budget: float

    @property
    def over_budget(self) -> float:
        """The error divided by its budget. The tensor passes if the value is at most 1.

        The value is infinite if a value is not finite, or if a value that must be zero is not zero.
        """
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
        """Each tensor's error, divided by its budget; the largest if a tensor was compared in more than one way."""
        ascending = sorted(self.tensor_errors, key=lambda one: one.over_budget)
        worst = {one.tensor: one.over_budget for one in ascending}
        return {one.tensor: worst[one.tensor] for one in self.tensor_errors}


class Unfit(Exception):
    """A case on which no backend can be judged, because rounding alone changes the right result beyond a budget."""


def check(
    case: Case,
    inputs: Inputs,
    parameters: Mapping[str, Tensor],
    passes: list[Tensors],
    fp8: str | None = None,
    ranks: Ranks = ALONE,
    wanted: Collection[str] | None = None,
    rounds_to: torch.dtype | None = None,
    partly: bool = False,
    lora_scale: float = 0.0,
    around: Around | None = None,
) -> ParityVerdict:
    """Compare every pass of a backend with the reference on the same inputs and parameters.

    All passes must have used these inputs and parameters. Inputs, parameters and passes are those of this rank, and the
    verdict is over all ranks. `fp8` names the recipe that the backend computes in; the budget then comes from this
    recipe's rounding. `wanted` names the tensors whose gradients a pass in mode train must have ("x", "weights" and
    parameters); None means all that are trained. `rounds_to` is the dtype whose rounding sets the budget; None means
    x's dtype. `lora_scale` is the factor of adapters among the parameters. `around` is what surrounds the experts of a
    block, whose inputs have the routing of its router. A gradient that is missing, that nobody
    wanted, or that has another shape or dtype than its tensor, is an infinite error.

    Raises Unfit if the case is at fault: its values overflow in its dtype, or vanish in its rounding. If `partly` is
    true, only an overflow is a fault of the case, and a tensor that vanishes in the rounding must only be finite.
    """
    of_block: Mapping[str, Tensor] = {} if around is None else around.parameters
    if wanted is None:
        wanted = ("x", *(["weights"] if around is None else of_block), *trained(parameters))
    known = {**parameters, **of_block}
    malformed = [error for tensors in passes for error in _malformed(case, inputs, known, tensors, wanted)]
    found = [error for rank in ranks.tell(malformed) for error in rank]
    if not found:
        product = torch.matmul if fp8 is None else fp8_product(fp8, _halved(case))
        dtype = rounds_to or inputs.x_TD.dtype
        travel = rows_in_fp8(fp8)
        errors = group_errors(case, inputs, parameters, passes, product, ranks, dtype, lora_scale, travel, around)
        own = {(one.tensor, one.group): _largest(_ratios(one.rounding_G, one.scale_G)) for one in errors}
        everywhere = ranks.tell(own)  # ranks may want the gradients of other tensors
        roundings = {key: max(rank.get(key, 0.0) for rank in everywhere) for rank in everywhere for key in rank}
        for (tensor, _), rounding in roundings.items():
            if math.isinf(rounding) or (rounding >= CEILING and not partly):
                raise Unfit(_unfit(case, tensor, rounding))
        errors = [
            _finite(one) if partly and roundings[one.tensor, one.group] * FACTOR > CEILING else one for one in errors
        ]
        stored = {name: tensor.dtype for name, tensor in passes[0].items()}
        mine = {
            (one.tensor, one.group): judge(one, _floor(case, inputs, fp8, one.tensor, dtype, stored[one.tensor]))
            for one in errors
        }
        told = ranks.tell(mine)
        found = [_worst_of_ranks([rank.get(key) for rank in told]) for key in roundings]
    return ParityVerdict(tuple(found))


def _halved(case: Case) -> tuple[int, int] | None:
    """Return the shape of an up projection whose columns are the halves gate and up; None if it has no halves."""
    is_halved = case.expert_activation not in ("quick_geglu", "relu2")
    return (case.dim, 2 * case.moe_inter_dim) if is_halved else None


def _unfit(case: Case, tensor: str, rounding: float) -> str:
    """Return why a tensor of the case cannot be judged."""
    how = "overflows" if math.isinf(rounding) else f"changes by {rounding:.2g} of its size when it is rounded"
    return f"{case.dtype} cannot hold this case: {tensor} {how}; choose a wider dtype or smaller values"


def _finite(errors: GroupErrors) -> GroupErrors:
    """Return the errors of a tensor that must only be finite: no error where it is."""
    return dataclasses.replace(errors, passes_PG=torch.where(errors.passes_PG.isfinite(), 0.0, errors.passes_PG))


def _floor(case: Case, inputs: Inputs, fp8: str | None, tensor: str, dtype: torch.dtype, stored: torch.dtype) -> float:
    """Return the least budget of a tensor, for the dtype of the computation and the dtype that stores the tensor."""
    unit, acc_unit, stored_unit, weights_unit = (
        torch.finfo(one).eps / 2 for one in (dtype, wide(dtype), stored, inputs.weights_TK.dtype)
    )
    most_rows = int((inputs.active_indices_TK.flatten() + 1).bincount(minlength=2)[1:].max())
    all_rows = 0 if case.subject == EXPERTS else len(inputs.x_TD)  # every token passes router and shared experts
    longest = max(case.dim, 2 * case.moe_inter_dim, most_rows, all_rows)
    floor = (unit if fp8 is None else FP8_UNIT) + acc_unit * math.sqrt(longest)
    floor *= REFERENCE_ROUNDS if dtype is torch.float64 else 1.0
    if weights_unit > unit:
        floor += weights_unit
    if stored_unit > unit:
        floor += STORED_UNITS * stored_unit
    return floor * (WEIGHTS_GRAD_UNITS if tensor == "weights.grad" else 1.0)


def _worst_of_ranks(found: Sequence[TensorError | None]) -> TensorError:
    """Return the worst error of a tensor, and the rank that has it. A rank that does not want the tensor has None."""
    told = [(rank, error) for rank, error in enumerate(found) if error is not None]
    rank, worst = max(told, key=lambda pair: pair[1].over_budget)
    return worst if len(found) == 1 else dataclasses.replace(worst, where=f"rank {rank}, {worst.where}")


def judge(errors: GroupErrors, floor: float) -> TensorError:
    """Return the worst error of one tensor over all passes, over the whole tensor and over each group."""
    whole = errors.scale_G.square().sum().sqrt()
    budget_of_whole = _budget(_ratios(_norm(errors.rounding_G), whole), floor)
    budget_of_group = _budget(_ratios(errors.rounding_G, errors.scale_G), floor)
    found = []
    for errors_G in errors.passes_PG:
        by_group_G = _ratios(errors_G, errors.scale_G)
        group = f"{errors.group} {int(by_group_G.argmax())}" if by_group_G.numel() else f"no {errors.group}"
        whole_error = _largest(_ratios(_norm(errors_G), whole))
        found.append(TensorError(errors.tensor, group, _largest(by_group_G), budget_of_group))
        found.append(TensorError(errors.tensor, "whole tensor", whole_error, budget_of_whole))
    return max(found, key=lambda one: one.over_budget)


def _budget(rounding_ratios: Tensor, floor: float) -> float:
    return min(CEILING, max(floor, FACTOR * _largest(rounding_ratios)))


def _malformed(
    case: Case,
    inputs: Inputs,
    parameters: Mapping[str, Tensor],
    tensors: Tensors,
    wanted: Collection[str],
) -> Iterator[TensorError]:
    expected = {"output": inputs.x_TD}
    if case.mode == "train":
        of = {"x": inputs.x_TD, "weights": inputs.weights_TK, **parameters}
        expected |= {f"{name}.grad": like for name, like in of.items() if name in wanted}
    for name in tensors.keys() - expected.keys():
        yield TensorError(name, "is a gradient that nobody wanted", math.inf, 1.0)
    for name, like in expected.items():
        found = tensors.get(name)
        if found is None:
            yield TensorError(name, "is None", math.inf, 1.0)
        elif found.shape != like.shape or found.dtype != (dtype := _stored(case, name, like)):
            what = f"is {found.dtype} {list(found.shape)} instead of {dtype} {list(like.shape)}"
            yield TensorError(name, what, math.inf, 1.0)


def _stored(case: Case, name: str, like: Tensor) -> torch.dtype:
    """Return the dtype of a pass's tensor: its own, and at least float32 for what micro-batches add up."""
    is_sum = case.surroundings.num_micro_batches > 1 and name not in ("output", "x.grad", "weights.grad")
    return wide(like.dtype) if is_sum else like.dtype


def _ratios(errors: Tensor, scale: Tensor) -> Tensor:
    """Return errors over their scale. No error gives 0; NaN, or an error where the scale is 0, gives infinity."""
    return torch.where(errors == 0, 0.0, errors / scale).nan_to_num(nan=math.inf, posinf=math.inf)


def _largest(ratios: Tensor) -> float:
    return float(ratios.max()) if ratios.numel() else 0.0


def _norm(norms: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


def are_identical(passes: Sequence[Tensors], ranks: Ranks = ALONE) -> bool:
    """Whether all passes hold the same tensors, bit by bit, on every rank. Every rank must call this function."""
    first, *others = passes
    same = all(
        first.keys() == other.keys() and all(_same_bits(first[name], other[name]) for name in first) for other in others
    )
    return all(ranks.tell(same))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    integers = _INTEGERS[a.dtype.itemsize]
    return a.dtype is b.dtype and a.view(integers).equal(b.view(integers))
