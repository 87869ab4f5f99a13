"""Is a backend right? Its output and every gradient against the loop path in float64.

Errors are scale-free: ‖a − ref‖ / ‖ref‖ over the whole tensor and over its worst group, a token's row or an expert.
A row's norm is floored at the tensor's root-mean-square row norm, so that cancellation accuses nobody; an expert's is
not. What must be zero (masked tokens, experts without tokens) must be exactly zero. Non-finite never passes.

Budgets are not constants: each is the loop's own rounding at the case's dtype against the same reference, times FACTOR,
with a floor from the dtype's rounding unit and the reduction's length. docs/concepts.md derives them.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experts.activations import accumulation_dtype
from experts.modules import PARAMETER_NAMES
from moebench.case import Case
from moebench.inputs import Inputs
from moebench.reference import GroupErrors, Tensors, compare

#: A budget is this many times the loop's own error. Two right backends round independently and alike, so that the worst
#: of many rows differs little between them; a fault of 2% in one expert exceeds it in every dtype.
FACTOR = 3.0
#: A row of the routing weights' gradient has only K numbers, too few for an average: its floor is this many units.
WEIGHTS_GRAD_UNITS = 4.0
#: No budget is larger, whatever the loop's error: a row of zeros, whose error is 1, never passes.
CEILING = 0.5


@dataclass(frozen=True)
class Finding:
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
class Verdict:
    """The worst finding of every tensor that was compared."""

    findings: tuple[Finding, ...]

    @property
    def worst(self) -> Finding:
        return max(self.findings, key=lambda finding: finding.over_budget)

    @property
    def passed(self) -> bool:
        return self.worst.over_budget <= 1

    @property
    def errors(self) -> dict[str, float]:
        """Error over budget by tensor."""
        return {finding.tensor: finding.over_budget for finding in self.findings}


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
    leaves = {"x": x_TD, "weights": weights_TK, **{name: getattr(module, name) for name in PARAMETER_NAMES}}
    grads = {f"{name}.grad": leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
    module.zero_grad(set_to_none=True)
    return {"output": output.detach(), **grads}


def check(case: Case, inputs: Inputs, parameters: Mapping[str, Tensor], passes: list[Tensors]) -> Verdict:
    """Compare every pass of a backend, all alike, with the reference on the same inputs and parameters.

    A gradient that is missing, or has another shape or dtype than its tensor, is an infinite error.
    """
    malformed = [finding for tensors in passes for finding in _malformed(case, inputs, parameters, tensors)]
    if malformed:
        return Verdict(tuple(malformed))
    dtype = inputs.x_TD.dtype
    unit, acc_unit = (torch.finfo(one).eps / 2 for one in (dtype, accumulation_dtype(dtype)))
    most_rows = int((inputs.active_indices_TK.flatten() + 1).bincount(minlength=2)[1:].max())
    floor = unit + acc_unit * math.sqrt(max(case.dim, 2 * case.moe_inter_dim, most_rows))
    floors = {"weights.grad": WEIGHTS_GRAD_UNITS * floor}
    errors = compare(case, inputs, parameters, passes)
    return Verdict(tuple(judge(one, floors.get(one.tensor, floor)) for one in errors))


def judge(errors: GroupErrors, floor: float) -> Finding:
    """The worst finding of one tensor over all its passes, as a whole and by group."""
    whole = errors.scale_G.square().sum().sqrt()
    budget_of_whole = _budget(_ratios(_norm(errors.loop_G), whole), floor)
    budget_of_group = _budget(_ratios(errors.loop_G, errors.scale_G), floor)
    findings = []
    for errors_G in errors.passes_PG:
        by_group_G = _ratios(errors_G, errors.scale_G)
        group = f"{errors.group} {int(by_group_G.argmax())}" if by_group_G.numel() else f"no {errors.group}"
        whole_error = _largest(_ratios(_norm(errors_G), whole))
        findings.append(Finding(errors.tensor, "whole tensor", whole_error, budget_of_whole))
        findings.append(Finding(errors.tensor, group, _largest(by_group_G), budget_of_group))
    return max(findings, key=lambda finding: finding.over_budget)


def _budget(loop_ratios: Tensor, floor: float) -> float:
    return min(CEILING, max(floor, FACTOR * _largest(loop_ratios)))


def _malformed(case: Case, inputs: Inputs, parameters: Mapping[str, Tensor], tensors: Tensors) -> Iterator[Finding]:
    expected = {"output": inputs.x_TD}
    if case.mode == "train":
        expected |= {"x.grad": inputs.x_TD, "weights.grad": inputs.weights_TK}
        expected |= {f"{name}.grad": parameter for name, parameter in parameters.items()}
    for name, like in expected.items():
        found = tensors.get(name)
        if found is None:
            yield Finding(name, "is None", math.inf, 1.0)
        elif found.shape != like.shape or found.dtype != like.dtype:
            what = f"is {found.dtype} {list(found.shape)} instead of {like.dtype} {list(like.shape)}"
            yield Finding(name, what, math.inf, 1.0)


def _ratios(errors: Tensor, scale: Tensor) -> Tensor:
    """Errors over their scale: no error is 0, an error where nothing may be is infinite, and so is NaN."""
    return torch.where(errors == 0, 0.0, errors / scale).nan_to_num(nan=math.inf, posinf=math.inf)


def _largest(ratios: Tensor) -> float:
    return float(ratios.max()) if ratios.numel() else 0.0


def _norm(norms: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Fill memory that operators leave uninitialised with NaN, so that whoever reads it is found out.

    On a CPU by torch's own deterministic filling; on a GPU by leaving NaN in the caching allocator's free blocks.
    """
    if device.type == "cuda":
        _poison_free_blocks(device)
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _poison_free_blocks(device: torch.device) -> None:
    """Take every free block that the allocator will give without asking the driver for more, largest first."""
    blocks = []
    num_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    while num_bytes >= 512:
        reserved = torch.cuda.memory_reserved(device)
        block = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        block.fill_(0xFF)  # all ones is NaN in every float format
        if torch.cuda.memory_reserved(device) == reserved:
            blocks.append(block)
        else:
            num_bytes //= 2
