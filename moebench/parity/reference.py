"""Run the loop path in float64 and in the case's dtype, and compute the errors of a backend's passes.

Errors are differences from the float64 run. The loop path runs expert by expert. Only one expert's parameters and
gradients are held in float64 at a time, so that the largest layers fit in memory. Under expert parallelism, each rank
runs its own experts on the gathered tokens of all ranks, and the ranks add up their sums over experts. The result
equals the result of a single process on all tokens.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from experts import MoEConfig
from experts.activations import accumulation_dtype, activation_form
from experts.compute import PARAMETER_NAMES, ExpertParameters
from experts.compute.loop import expert_forward
from moebench.parity.quantization import Product
from moebench.workload.case import Case
from moebench.workload.inputs import Inputs, moe_config
from moebench.workload.ranks import ALONE, Ranks

Tensors = dict[str, Tensor]

#: An error in a random direction of D dimensions has about 1/√D of its size along a given direction. The error hardly
#: ever has more than this many times 1/√D.
BY_CHANCE = 4.0


@dataclass(frozen=True)
class GroupErrors:
    """The norms of one tensor's groups G. A group is the row of one token, or one expert.

    `scale_G` is the norm of the reference, by which errors are divided. It is exactly zero where the tensor must be
    exactly zero. Elsewhere it has a floor, except for gradients of parameters. `loop_G` is the norm of the loop's own
    error, and `passes_PG` is the norm of the error of each pass P.

    The groups of the output may also be experts. An expert's error is then the part of the output's error that lies
    along what the expert adds to its tokens. This part shows a wrong factor on the expert's contribution, even if other
    experts add much more. It shows hardly any rounding, because rounding has no particular direction.
    """

    tensor: str
    group: str  # "token" or "expert"
    scale_G: Tensor
    loop_G: Tensor
    passes_PG: Tensor


def group_errors(
    case: Case,
    inputs: Inputs,
    parameters: Mapping[str, Tensor],
    passes: list[Tensors],
    product: Product = torch.matmul,
    ranks: Ranks = ALONE,
) -> list[GroupErrors]:
    """Return the errors of `output` and, in mode train, of the gradients of x, routing weights and parameters.

    Inputs, parameters and passes are those of this rank. `product` is the matrix product of the loop that sets the
    budget. If `product` rounds to FP8, the result also has the errors of `output` by expert.
    """
    everyone = Inputs(*(ranks.rows(getattr(inputs, field.name)) for field in fields(inputs)))
    run = _Run(case, everyone, parameters, product)
    first = ranks.rank * (case.n_routed_experts // ranks.size)
    by_expert = [run.expert(first + local, local, passes) for local in range(case.n_routed_experts // ranks.size)]
    own = _own_rows(inputs, ranks)
    sums = run.finish(ranks, own)
    inactive_TK = inputs.active_indices_TK < 0
    inactive_T1 = inactive_TK.all(dim=1, keepdim=True)
    errors = [_token_errors("output", sums, inputs, inactive_T1, passes)]
    if product is not torch.matmul:
        outputs = [ranks.rows(tensors["output"]) for tensors in passes]
        errors.append(run.factors(range(first, first + len(by_expert)), outputs))
    if case.mode == "train":
        errors.append(_token_errors("x.grad", sums, inputs, inactive_T1, passes))
        errors.append(_token_errors("weights.grad", sums, inputs, inactive_TK, passes))
        for name in parameters:
            exact_G, loop_G, *passes_PG = torch.stack([norms[name] for norms in by_expert], dim=1)
            errors.append(GroupErrors(f"{name}.grad", "expert", exact_G, loop_G, torch.stack(passes_PG)))
    return errors


def _own_rows(inputs: Inputs, ranks: Ranks) -> slice:
    before = sum(ranks.tell(inputs.x_TD.shape[0])[: ranks.rank])
    return slice(before, before + inputs.x_TD.shape[0])


@dataclass(frozen=True)
class _Sums:
    """Per-token tensors, summed over experts: `exact` in float64, and `loops` in the dtype that the loop sums in.

    The gradient of a routing weight is a sum over D of terms that may cancel. `chance_TK` is the size that such a sum
    has by chance.
    """

    exact: Tensors
    loops: list[Tensors]
    chance_TK: Tensor

    def loop_error(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return [T], the norm of the loop's error in each token's row; for a gradient, the largest of all its runs."""
        loops = self.loops[:1] if name == "output" else self.loops
        errors = [_norms(loop[name].to(dtype).double() - self.exact[name]) for loop in loops]
        return torch.stack(errors).amax(dim=0)


class _Run:
    """The runs over this rank's experts on the tokens of all ranks: one in float64, the others in the loop's dtype."""

    def __init__(self, case: Case, inputs: Inputs, parameters: Mapping[str, Tensor], product: Product) -> None:
        self.case, self.inputs, self.parameters, self.product = case, inputs, parameters, product
        acc = accumulation_dtype(inputs.x_TD.dtype)
        like = {"output": inputs.x_TD, "x.grad": inputs.x_TD, "weights.grad": inputs.weights_TK}
        self.exact = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
        config = moe_config(case).with_dtype(inputs.x_TD.dtype)
        self.exactly = config.with_dtype(torch.float64)
        moved = case.mode == "train" and product is torch.matmul  # FP8 rounds much more coarsely than the limits move
        self.configs = [config, *(_limits_moved(config) if moved else [])]
        self.loops = [{name: torch.zeros_like(t, dtype=acc) for name, t in like.items()} for _ in self.configs]
        self.chance_TK = torch.zeros_like(inputs.weights_TK, dtype=torch.float64)

    def expert(self, index: int, local: int, passes: list[Tensors]) -> Tensors:
        """Run one expert in float64 and as the loop does, and add its results to the sums.

        In mode train, return norms [2 + P] by parameter: of the exact gradient, of the loop's error, and of the error
        of each pass P. In mode forward, return an empty dict.
        """
        inputs = self.inputs
        at = torch.where(inputs.active_indices_TK == index)
        train = self.case.mode == "train"
        exact = self._one_way(local, at, self.exactly, torch.matmul, train)
        loops = [self._one_way(local, at, config, self.product, train) for config in self.configs]
        for sums, run in zip((self.exact, *self.loops), (exact, *loops), strict=True):
            _add(sums, run, at)
        if not train:
            return {}
        sizes_N = _norms(exact["output"]) * _norms(inputs.grad_TD[at[0]].double()) / math.sqrt(self.case.dim)
        weights_N = inputs.weights_TK[at].double()
        self.chance_TK[at] = torch.where(weights_N == 0, 0.0, sizes_N / weights_N.abs())
        norms = {}
        for name in self.parameters:
            found = [*(loop[name] for loop in loops), *(tensors[f"{name}.grad"][local] for tensors in passes)]
            errors = torch.stack([torch.linalg.vector_norm(one.double() - exact[name]) for one in found])
            of_loop, of_passes = errors.tensor_split([len(loops)])
            norms[name] = torch.stack([torch.linalg.vector_norm(exact[name]), of_loop.amax(), *of_passes])
        return norms

    def _one_way(self, local: int, at: tuple[Tensor, ...], config: MoEConfig, product: Product, train: bool) -> Tensors:
        """Return the output [N, D] of one expert in the config's dtype and, if `train`, every gradient by name."""
        inputs, dtype = self.inputs, config.dtype
        x_ND = inputs.x_TD[at[0]].to(dtype).requires_grad_(train)
        weights_N = inputs.weights_TK[at].to(accumulation_dtype(dtype)).requires_grad_(train)
        expert = {name: stacked[local].to(dtype).requires_grad_(train) for name, stacked in self.parameters.items()}
        parameters = ExpertParameters(*(expert.get(name) for name in PARAMETER_NAMES))  # type: ignore[arg-type]
        output_ND = expert_forward(x_ND, weights_N, parameters, config, product)
        if not train:
            return {"output": output_ND}
        leaves = {"x.grad": x_ND, "weights.grad": weights_N, **expert}
        grad_ND = inputs.grad_TD[at[0]].to(output_ND.dtype)
        grads = torch.autograd.grad(output_ND, list(leaves.values()), grad_ND)
        return {"output": output_ND.detach(), **dict(zip(leaves, grads, strict=True))}

    def finish(self, ranks: Ranks, own: slice) -> _Sums:
        """Return the sums over the experts of all ranks, for this rank's own tokens."""
        for sums in (self.exact, *self.loops):
            for tensor in sums.values():
                ranks.sum(tensor)
        ranks.sum(self.chance_TK)
        exact, *loops = ({name: tensor[own] for name, tensor in sums.items()} for sums in (self.exact, *self.loops))
        return _Sums(exact, loops, self.chance_TK[own])

    def factors(self, experts: range, outputs: list[Tensor]) -> GroupErrors:
        """Return the output's errors by expert. `finish` must have added up the sums of all ranks before."""
        exact, loop = self.exact["output"], self.loops[0]["output"].to(self.inputs.x_TD.dtype)
        chance = BY_CHANCE / math.sqrt(min(self.case.dim, self.case.moe_inter_dim))
        norms = []
        for local, index in enumerate(experts):
            at = torch.where(self.inputs.active_indices_TK == index)
            own_ND = self._one_way(local, at, self.exactly, torch.matmul, train=False)["output"]
            exact_ND, size = exact[at[0]], torch.linalg.vector_norm(own_ND)
            direction_ND = own_ND / size.clamp(min=torch.finfo(size.dtype).tiny)
            along = [((one[at[0]].double() - exact_ND) * direction_ND).sum().abs() for one in (loop, *outputs)]
            norms.append(torch.stack([size.maximum(chance * torch.linalg.vector_norm(exact_ND)), *along]))
        scale_G, loop_G, *passes_PG = torch.stack(norms, dim=1)
        return GroupErrors("output", "expert", scale_G, loop_G, torch.stack(passes_PG))


def _limits_moved(config: MoEConfig) -> list[MoEConfig]:
    """Return the layer with its limits one rounding lower and one rounding higher; an empty list without limits.

    A gradient jumps where a value meets a limit. If rounding can carry the value over the limit, there are two right
    gradients. The loop's own error is the largest over all positions of the limits.
    """
    if not activation_form(config).limit:
        return []
    eps = torch.finfo(config.dtype).eps
    limits = {name: getattr(config, name) for name in ("activation_limit", "swiglu_limit")}
    return [
        dataclasses.replace(config, **{name: limit * factor for name, limit in limits.items()})
        for factor in (1 - eps, 1 + eps)
    ]


def _add(sums: Tensors, run: Tensors, at: tuple[Tensor, ...]) -> None:
    sums["output"].index_add_(0, at[0], run["output"].to(sums["output"].dtype))
    if "x.grad" in run:
        sums["x.grad"].index_add_(0, at[0], run["x.grad"].to(sums["x.grad"].dtype))
        sums["weights.grad"][at] = run["weights.grad"].to(sums["weights.grad"].dtype)


def _token_errors(name: str, sums: _Sums, inputs: Inputs, inactive: Tensor, passes: list[Tensors]) -> GroupErrors:
    """Return the errors by token. `inactive` [T, 1] or [T, K] marks the values that must be exactly zero."""
    like = inputs.weights_TK if name == "weights.grad" else inputs.x_TD
    exact = sums.exact[name]
    scale_T = _norms(exact)
    if name == "weights.grad":
        scale_T = scale_T.maximum(_norms(sums.chance_TK))
    active_T = ~inactive.all(dim=1)
    root_mean_square = (scale_T.square().sum() / active_T.sum().clamp(min=1)).sqrt()
    scale_T = torch.where(active_T, scale_T.maximum(root_mean_square), 0.0)
    found = [tensors[name].double() for tensors in passes]
    errors = [torch.where(inactive & (one != 0), math.inf, one - exact) for one in found]
    return GroupErrors(
        name, "token", scale_T, sums.loop_error(name, like.dtype), torch.stack([_norms(e) for e in errors])
    )


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms
