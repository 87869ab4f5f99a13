"""Compute the errors of a backend's passes: their differences from the oracle in float64.

The oracle runs again with the rounding of the case's dtype (moebench.parity.rounding), to show what rounding costs. It
runs some experts at a time. Only their parameters and gradients are held in float64, so that the largest layers fit in
memory. Under expert parallelism, each rank runs its own experts on the gathered tokens of all ranks, and the ranks add
up their sums over experts. The result equals the result of a single process on all tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moebench.parity.batches import Batch, batches
from moebench.parity.chance import sizes_by_chance
from moebench.parity.oracle import Formula, Product, Values, experts_values, gradients, trained, wide
from moebench.parity.rounding import Operands, Rounding, roundings
from moebench.parity.together import ON_CPU
from moebench.workload.case import Case
from moebench.workload.inputs import Inputs
from moebench.workload.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from moebench.parity.block import Around

Tensors = dict[str, Tensor]

#: An error in a random direction of D dimensions has about 1/√D of its size along a given direction. The error hardly
#: ever has more than this many times 1/√D.
BY_CHANCE = 4.0
#: A layer whose experts all run together on a CPU has this many perturbed runs, because its tensors have few values,
#: and the largest of few random errors says little. Every other layer has two perturbed runs.
PERTURBED_RUNS = 5


@dataclass(frozen=True)
class GroupErrors:
    """The norms of one tensor's groups G. A group is the row of one token, or one expert.

    `scale_G` is the norm of the reference, by which errors are divided. It is exactly zero where the tensor must be
    exactly zero. Elsewhere it is at least the size that the tensor's sums have by chance, where their terms do not
    happen to cancel. `rounding_G` is the largest error of the oracle's runs that round, and `passes_PG` is the norm of
    the error of each pass P.

    The groups of the output may also be experts. An expert's error is then the part of the output's error that lies
    along what the expert adds to its tokens. This part shows a wrong factor on the expert's contribution, even if other
    experts add much more. It shows hardly any rounding, because rounding has no particular direction.
    """

    tensor: str
    group: str  # "token", "expert" or "all"
    scale_G: Tensor
    rounding_G: Tensor
    passes_PG: Tensor


def group_errors(
    case: Case,
    inputs: Inputs,
    parameters: Mapping[str, Tensor],
    passes: list[Tensors],
    product: Product = torch.matmul,
    ranks: Ranks = ALONE,
    rounds_to: torch.dtype | None = None,
    lora_scale: float = 0.0,
    travel: Callable[[Tensor], Tensor] | None = None,
    around: "Around | None" = None,
) -> list[GroupErrors]:
    """Return the errors of every tensor of the passes: `output`, and in mode train the gradients that the passes have.

    Inputs, parameters and passes are those of this rank. `product` is the matrix product of the run that sets the
    budget. If `product` rounds to FP8, the result also has the errors of `output` by expert. `rounds_to` is the dtype
    whose rounding the oracle shows; None means x's dtype. `lora_scale` is the factor of adapters among the parameters.
    `travel` is what that run does to rows before (`moebench.parity.rounding.Rounding`). `around` is what surrounds the
    experts, if the passes are those of a block.
    """
    everyone = _gathered(inputs, ranks)
    run = _Run(case, everyone, parameters, product, ranks, rounds_to or inputs.x_TD.dtype, lora_scale, travel)
    by_expert = run.experts(passes)
    run.add_ranks()
    own = _own_rows(inputs, ranks)
    runs = [(run.reference, run.exact), *zip(run.roundings, run.rounded, strict=True)]
    of_block = [] if around is None else around.errors(everyone, own, runs, passes, run.generator)
    inactive_TK = inputs.active_indices_TK < 0
    inactive_T1 = inactive_TK.all(dim=1, keepdim=True)
    errors = [run.token_errors("output", own, inactive_T1, passes), *of_block]
    if product is not torch.matmul:
        errors.append(run.factors([ranks.rows(tensors["output"]) for tensors in passes]))
    for name in passes[0]:
        if name in ("x.grad", "weights.grad"):
            errors.append(run.token_errors(name, own, inactive_TK if name[0] == "w" else inactive_T1, passes))
        elif name in by_expert:
            scale_G, rounding_G, *passes_PG = by_expert[name]
            errors.append(GroupErrors(name, "expert", scale_G, rounding_G, torch.stack(passes_PG)))
    return errors


def exact_pass(
    case: Case, inputs: Inputs, parameters: Mapping[str, Tensor], ranks: Ranks = ALONE, lora_scale: float = 0.0
) -> Tensors:
    """Return `output` and every gradient of a pass in mode train in float64, for this rank's tokens and experts."""
    everyone = _gathered(inputs, ranks)
    case = case.model_copy(update={"mode": "train"})
    run = _Run(case, everyone, parameters, torch.matmul, ranks, torch.float32, lora_scale)
    grads = {name: torch.zeros_like(parameters[name], dtype=torch.float64) for name in trained(parameters)}
    for batch in run.batches:
        found = run.reference_of(batch).grads
        for name, grad in grads.items():
            grad[batch.experts_G] = found[name]
    run.add_ranks()
    own = _own_rows(inputs, ranks)
    by_token = {name: tensor[own] for name, tensor in run.exact.items()}
    return by_token | {f"{name}.grad": grad for name, grad in grads.items()}


def _gathered(inputs: Inputs, ranks: Ranks) -> Inputs:
    """Return the inputs of all ranks, with indices in int64, because gloo does not carry every integer dtype."""
    wide_indices = dataclasses.replace(inputs, indices_TK=inputs.indices_TK.long())
    return Inputs(*(ranks.rows(getattr(wide_indices, field.name)) for field in fields(inputs)))


def _own_rows(inputs: Inputs, ranks: Ranks) -> slice:
    before = sum(ranks.tell(inputs.x_TD.shape[0])[: ranks.rank])
    return slice(before, before + inputs.x_TD.shape[0])


class _Run:
    """The runs over this rank's experts on the tokens of all ranks: one in float64, the others with rounding."""

    def __init__(
        self,
        case: Case,
        inputs: Inputs,
        parameters: Mapping[str, Tensor],
        product: Product,
        ranks: Ranks,
        rounds_to: torch.dtype,
        lora_scale: float,
        travel: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.case, self.inputs, self.parameters, self.ranks = case, inputs, parameters, ranks
        num_local, dim, width = parameters["gate_and_up_projs"].shape
        first = ranks.ep_rank * num_local
        by_itself = product is not torch.matmul  # FP8 scales the tensors of each expert by themselves
        elements = 2 * dim * width
        self.batches = list(batches(inputs.active_indices_TK, first, num_local, elements, by_itself))
        sizes = [batch.tokens_GM.shape for batch in self.batches]
        most_rows = max((size[1] for size in sizes), default=1)
        is_small = sum(size[0] for size in sizes) <= max(1, ON_CPU.most(most_rows, elements))
        num_perturbed = PERTURBED_RUNS if is_small else 2
        self.reference = Rounding(Formula.of(case, lora_scale), torch.float64)
        self.roundings = roundings(self.reference.formula, rounds_to, product, num_perturbed, max(dim, width), travel)
        self.generator = torch.Generator(inputs.x_TD.device).manual_seed(case.seed)
        self.exact, self.chance = self._zeros(torch.float64), self._zeros(torch.float64)
        self.rounded = [self._zeros(wide(one.dtype)) for one in self.roundings]

    def _zeros(self, dtype: torch.dtype) -> Tensors:
        x_TD, weights_TK = self.inputs.x_TD, self.inputs.weights_TK
        like = {"output": x_TD, "x.grad": x_TD, "weights.grad": weights_TK}
        return {name: torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) for name, tensor in like.items()}

    def experts(self, passes: list[Tensors]) -> dict[str, Tensor]:
        """Run all experts, and add their results to the sums by token.

        Return norms [2 + P, L] by gradient of a parameter: the scale, the largest error of the runs that round, and the
        error of each pass P. An expert without rows has scale 0, and its errors are the norms of the gradients.
        """
        wanted = [name for name in passes[0] if name.removesuffix(".grad") in self.parameters]
        norms = {}
        for name in wanted:
            of_passes = [_norms(tensors[name].flatten(1).double()) for tensors in passes]
            norms[name] = torch.stack([torch.zeros_like(of_passes[0])] * 2 + of_passes)
        for batch in self.batches:
            operands = self._operands(batch)
            exact = self._run(batch, operands, self.reference, self.exact)
            chance = self._chance(batch, exact)
            rounded = self._roundings(batch, operands, exact.grads, wanted)
            for name in wanted:
                own, parameter = batch.experts_G, name.removesuffix(".grad")
                stored = _distances(exact.grads[parameter].to(passes[0][name].dtype), exact.grads[parameter])
                of_passes = [_distances(tensors[name][own], exact.grads[parameter]) for tensors in passes]
                scale_G = _norms(exact.grads[parameter].flatten(1)).maximum(chance[parameter])
                norms[name][:, own] = torch.stack([scale_G, torch.hypot(rounded[name], stored), *of_passes])
        return norms

    def _roundings(self, batch: Batch, operands: Operands, exact: Tensors, wanted: Sequence[str]) -> Tensors:
        """Run a batch with rounding, one run after the other, and return the largest error of each wanted gradient."""
        largest: Tensors = {}
        for one, sums in zip(self.roundings, self.rounded, strict=True):
            grads = self._run(batch, operands, one, sums).grads
            for name in wanted:
                parameter = name.removesuffix(".grad")
                error_G = one.share * _distances(grads[parameter], exact[parameter])
                largest[name] = error_G.maximum(largest[name]) if name in largest else error_G
        return largest

    def _operands(self, batch: Batch) -> Operands:
        inputs = self.inputs
        experts = {name: stacked[batch.experts_G] for name, stacked in self.parameters.items()}
        weights_GM = batch.weights(inputs.weights_TK)
        return Operands(batch.rows(inputs.x_TD), weights_GM, experts, batch.rows(inputs.grad_TD))

    def reference_of(self, batch: Batch) -> "_Result":
        """Run a batch in float64, and add its results to the sums by token."""
        return self._run(batch, self._operands(batch), self.reference, self.exact)

    def _run(self, batch: Batch, exact: Operands, rounding: Rounding, sums: Tensors) -> "_Result":
        operands = rounding.operands(exact, self.generator)
        arguments = rounding.formula, operands.x_GMD, operands.weights_GM, operands.experts
        if self.case.mode == "forward":
            result = _Result(operands, experts_values(*arguments, rounding.product), {})
        else:
            result = _Result(operands, *gradients(*arguments, operands.grad_GMD, rounding.product))
            batch.add_rows(sums["x.grad"], result.grads["x"])
            batch.put_weights(sums["weights.grad"], result.grads["weights"])
        batch.add_rows(sums["output"], result.values.y)
        return result

    def _chance(self, batch: Batch, exact: "_Result") -> Tensors:
        """Add the squared sizes by chance to the sums by token, and return the sizes [G] of parameters' gradients."""
        sizes = sizes_by_chance(self.reference.formula, exact.operands, exact.values, exact.grads)
        batch.add_rows(self.chance["output"], sizes.pop("output"))
        if exact.grads:
            batch.add_rows(self.chance["x.grad"], sizes.pop("x"))
            batch.put_weights(self.chance["weights.grad"], sizes.pop("weights"))
        return sizes

    def add_ranks(self) -> None:
        """Add up the sums by token over the experts of all ranks."""
        for sums in (self.exact, self.chance, *self.rounded):
            for tensor in sums.values():
                self.ranks.sum(tensor)

    def token_errors(self, name: str, own: slice, inactive: Tensor, passes: list[Tensors]) -> GroupErrors:
        """Return the errors by token of this rank's rows `own`.

        `inactive` [T, 1] or [T, K] marks the values that must be exactly zero.
        """
        exact, dtype = self.exact[name][own], passes[0][name].dtype
        by_chance_T = self.chance[name][own].sum(dim=-1).sqrt()
        scale_T = _norms(exact).maximum(by_chance_T)
        active_T = ~inactive.all(dim=1)
        root_mean_square = (scale_T.square().sum() / active_T.sum().clamp(min=1)).sqrt()
        scale_T = torch.where(active_T, scale_T.maximum(root_mean_square), 0.0)
        of_runs = [
            one.share * _norms(sums[name][own].double() - exact)
            for one, sums in zip(self.roundings, self.rounded, strict=True)
        ]
        stored_T = _norms(exact.to(dtype).double() - exact)
        found = [tensors[name].double() for tensors in passes]
        errors = [torch.where(inactive & (one != 0), math.inf, one - exact) for one in found]
        rounding_T = torch.hypot(torch.stack(of_runs).amax(dim=0), stored_T)
        return GroupErrors(name, "token", scale_T, rounding_T, torch.stack([_norms(each) for each in errors]))

    def factors(self, outputs: list[Tensor]) -> GroupErrors:
        """Return the output's errors by expert. `add_ranks` must have added up the sums of all ranks before."""
        exact, rounded = self.exact["output"], self.rounded[0]["output"].to(self.inputs.x_TD.dtype)
        chance = BY_CHANCE / math.sqrt(min(self.case.dim, self.case.moe_inter_dim))
        num_local = self.parameters["gate_and_up_projs"].shape[0]
        norms = torch.zeros(2 + len(outputs), num_local, dtype=torch.float64, device=exact.device)
        for batch in self.batches:
            operands = self.reference.operands(self._operands(batch), self.generator)
            values = experts_values(self.reference.formula, operands.x_GMD, operands.weights_GM, operands.experts)
            own_GN = values.y.flatten(1)
            exact_GN = batch.rows(exact).flatten(1)
            size_G = _norms(own_GN)
            direction_GN = own_GN / size_G.clamp(min=torch.finfo(size_G.dtype).tiny).unsqueeze(1)
            along = [
                ((batch.rows(one).double().flatten(1) - exact_GN) * direction_GN).sum(dim=1).abs()
                for one in (rounded, *outputs)
            ]
            norms[:, batch.experts_G] = torch.stack([size_G.maximum(chance * _norms(exact_GN)), *along])
        scale_G, rounding_G, *passes_PG = norms
        return GroupErrors("output", "expert", scale_G, rounding_G, torch.stack(passes_PG))


@dataclass(frozen=True)
class _Result:
    """What one run computed for a batch, and what it read. In mode forward, `grads` is empty."""

    operands: Operands
    values: Values
    grads: Tensors


def _distances(found: Tensor, exact: Tensor) -> Tensor:
    """Return the norm of the difference of each expert's tensor, [G]."""
    return _norms((found.double() - exact).flatten(1))


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms
