"""The oracle of a block: what surrounds the routed experts, and what it adds to output and gradients.

A block is a router, shared experts if it has any, and the routed experts. The formulas are those of docs/concepts.md.
Like moebench.parity.oracle, this module imports nothing from `experts`. S is the width of the shared experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebench.parity.oracle import Formula, activation, wide
from moebench.parity.reference import GroupErrors, Tensors
from moebench.parity.rounding import Rounding
from moebench.workload.case import Case, width
from moebench.workload.inputs import Inputs
from moebench.workload.models import block_of

#: A choice is clear if the score of the last expert that is chosen exceeds the next score by this many rounding units
#: of the scores' dtype, relative to the token's largest score. Then every right router chooses the same experts, with
#: whatever order of sums.
CLEAR = 100.0
#: DeepSeek-V3 adds it to the sum by which it divides.
TINY = 1e-20
#: The standard deviation of the correction bias: as large as differences between scores, so that it changes choices.
BIAS_STD = 0.05

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Around:
    """What surrounds the routed experts of a case's block.

    `fields` are those of `moebench.workload.models.BLOCKS`. `parameters` has the parameters by their names in the
    block: `router.weight` [E, D] and, with shared experts, `shared_experts.gate_and_up_proj` [D, 2S] ([D, S] ungated),
    `shared_experts.down_proj` [S, D] and perhaps `shared_experts.gate` [D, 1], in the case's dtype. `bias_E` is the
    router's correction bias [E] in float32, or None.
    """

    case: Case
    fields: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    bias_E: Tensor | None

    @torch.no_grad()
    def route(self, inputs: Inputs) -> None:
        """Give the inputs the router's weights and choices, in place.

        A token whose choice is not clear first becomes a copy of the token with the clearest choice. So no choice
        depends on the last bits of a score.
        """
        if len(inputs.x_TD) == 0:
            return
        is_active_T, x_TD = inputs.token_mask_T, inputs.x_TD
        _, clearness_T = self._choose(self._scores(x_TD, is_active_T))
        clearest = clearness_T.masked_fill(~is_active_T, -math.inf).argmax()
        is_unclear_T = is_active_T & (clearness_T < CLEAR * torch.finfo(wide(x_TD.dtype)).eps / 2)
        x_TD.copy_(torch.where(is_unclear_T.unsqueeze(1), x_TD[clearest], x_TD))
        scores_TE = self._scores(x_TD, is_active_T)
        indices_TK, _ = self._choose(scores_TE)
        inputs.indices_TK.copy_(indices_TK)
        inputs.weights_TK.copy_(self._weights(scores_TE, indices_TK))

    def _scores(self, x_TD: Tensor, is_active_T: Tensor) -> Tensor:
        return self._scores_of(_active(x_TD, is_active_T), self.parameters["router.weight"])

    def _scores_of(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        inner = wide(x_TD.dtype)
        logits_TE = x_TD.to(inner) @ weight_ED.to(inner).T
        return logits_TE.sigmoid() if self.fields.get("score_func") == "sigmoid" else logits_TE.softmax(dim=-1)

    def _choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the choices [T, K], and how clear each token's choice is, relative to its largest score."""
        choice_TE = scores_TE if self.bias_E is None else scores_TE + self.bias_E
        largest_T = choice_TE.abs().amax(dim=-1)
        groups, limited = self.fields.get("n_expert_groups", 1), self.fields.get("n_limited_groups", 1)
        clear_T = torch.full_like(largest_T, math.inf)
        if limited < groups:
            grouped_TGE = choice_TE.unflatten(1, (groups, -1))
            best_TG = grouped_TGE.topk(1 if self.bias_E is None else 2, dim=-1).values.sum(dim=-1)
            allowed, clear_T = _largest(best_TG, limited)
            is_out = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, allowed, False)
            choice_TE = grouped_TGE.masked_fill(is_out.unsqueeze(-1), -math.inf).flatten(1)
        indices_TK, clear_of_experts_T = _largest(choice_TE, self.case.n_activated_experts)
        return indices_TK, clear_T.minimum(clear_of_experts_T) / largest_T

    def _weights(self, scores_TE: Tensor, indices_TK: Tensor) -> Tensor:
        weights_TK = scores_TE.gather(1, indices_TK)
        if self.fields.get("norm_topk_prob"):
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + TINY)
        return weights_TK * float(self.fields.get("route_scale", 1.0))

    def _shared(self, x_TD: Tensor, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """Return the output of the shared experts, with the rounding of x's dtype between the steps."""
        if "shared_experts.down_proj" not in parameters:
            return None
        h_TH = x_TD @ parameters["shared_experts.gate_and_up_proj"]
        a_TS = activation(Formula.of(self.case), h_TH.to(wide(x_TD.dtype))).to(x_TD.dtype)
        y_TD = a_TS @ parameters["shared_experts.down_proj"]
        gate_D1 = parameters.get("shared_experts.gate")
        return y_TD if gate_D1 is None else y_TD * (x_TD @ gate_D1).sigmoid()

    def added(self, inputs: Inputs, weights_grad_TK: Tensor, dtype: torch.dtype, change: Change) -> Tensors:
        """Return what the block adds around its experts, in `dtype`: to `output` and, in mode train, to `x.grad`.

        In mode train, the result also has the gradient of each parameter. `weights_grad_TK` is the gradient of the
        routing weights. `change` is applied to each operand: a rounding of the oracle.
        """
        is_train = self.case.mode == "train"
        leaves = {"x": _active(inputs.x_TD, inputs.token_mask_T), **self.parameters}
        leaves = {name: change(leaf).detach().requires_grad_(is_train) for name, leaf in leaves.items()}
        with torch.set_grad_enabled(is_train):
            shared_TD = self._shared(leaves["x"], leaves)
            scores_TE = self._scores_of(leaves["x"], leaves["router.weight"])
            outputs = [self._weights(scores_TE, inputs.indices_TK)]
        grads = [weights_grad_TK.to(wide(dtype))]
        found = {"output": torch.zeros_like(leaves["x"]) if shared_TD is None else shared_TD.detach()}
        if not is_train:
            return found
        if shared_TD is not None:
            outputs.append(shared_TD)
            grads.append(change(inputs.grad_TD))
        x_grad_TD, *of_parameters = torch.autograd.grad(outputs, list(leaves.values()), grads)
        found["x.grad"] = _active(x_grad_TD, inputs.token_mask_T)
        return found | {f"{name}.grad": grad for name, grad in zip(self.parameters, of_parameters, strict=True)}

    def errors(
        self,
        inputs: Inputs,
        own: slice,
        runs: Sequence[tuple[Rounding, Tensors]],
        passes: Sequence[Tensors],
        generator: torch.Generator,
    ) -> list[GroupErrors]:
        """Return the errors of the gradients of this rank's router and shared experts.

        The gradients are sums over this rank's tokens. With FSDP, they are sums over the tokens of all ranks. `inputs`
        are those of all ranks, and `own` are this rank's rows. `runs` are the oracle's runs with their sums by token,
        first the reference. What the block adds by token is added to these sums.
        """
        mine = Inputs(*(getattr(inputs, field.name)[own] for field in fields(inputs)))
        of_runs = []
        for rounding, sums in runs:
            change = partial(rounding.changed, generator=generator)
            found = self.added(inputs, sums["weights.grad"], rounding.dtype, change)
            for name in ("output", "x.grad") if self.case.mode == "train" else ("output",):
                sums[name].copy_(sums[name].to(rounding.dtype) + found.pop(name))
            if len(mine.x_TD) < len(inputs.x_TD) and not self.case.surroundings.fsdp2:
                found = self.added(mine, sums["weights.grad"][own], rounding.dtype, change)
            of_runs.append(found)
        exact, *rounded = of_runs
        shares = [rounding.share for rounding, _ in runs[1:]]
        names = [f"{name}.grad" for name in self.parameters if f"{name}.grad" in passes[0]]
        return [_of_parameter(name, exact, list(zip(shares, rounded, strict=True)), passes) for name in names]

    def flops(self) -> float:
        """Return the useful floating-point operations of router and shared experts on one rank, like `Case.flops`.

        Forward has 2·T·dim·E for the router and 6·T·dim·S for shared experts (4·T·dim·S ungated), and mode train has
        three times as many.
        """
        numbers = sum(parameter.numel() for parameter in self.parameters.values())
        return 2 * self.case.num_active_tokens * numbers * (3 if self.case.mode == "train" else 1)


def _of_parameter(
    name: str, exact: Tensors, rounded: Sequence[tuple[float, Tensors]], passes: Sequence[Tensors]
) -> GroupErrors:
    """Return the errors of a gradient: for the router by expert, and for shared experts of the whole tensor.

    A row of the router's gradient may be small, because other rows say what it says. So its scale is at least the root
    mean square of the rows.
    """
    group = "expert" if name == "router.weight.grad" else "all"

    def rows(tensor: Tensor) -> Tensor:
        return tensor.double() if group == "expert" else tensor.double().reshape(1, -1)

    def norms(found: Tensor) -> Tensor:
        norms_G: Tensor = torch.linalg.vector_norm(rows(found) - rows(exact[name]), dim=-1)
        return norms_G

    scale_G = torch.linalg.vector_norm(rows(exact[name]), dim=-1)
    scale_G = scale_G.maximum(scale_G.square().mean().sqrt())
    of_runs_G = torch.stack([share * norms(grads[name]) for share, grads in rounded]).amax(dim=0)
    rounding_G = torch.hypot(of_runs_G, norms(exact[name].to(passes[0][name].dtype)))
    return GroupErrors(name, group, scale_G, rounding_G, torch.stack([norms(tensors[name]) for tensors in passes]))


def _active(x_TD: Tensor, is_active_T: Tensor) -> Tensor:
    """Return x with zeros for masked tokens."""
    return x_TD.masked_fill(~is_active_T.unsqueeze(1), 0.0)


def _largest(values_TN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the places [T, count] of each row's largest values, and by how much the last one exceeds the next."""
    if count == values_TN.shape[1]:
        return values_TN.topk(count, dim=-1).indices, torch.full_like(values_TN[:, 0], math.inf)
    ranked = values_TN.topk(count + 1, dim=-1)
    return ranked.indices[:, :count], ranked.values[:, count - 1] - ranked.values[:, count]


def make_around(case: Case, device: torch.device) -> Around | None:
    """Return what surrounds the experts of a case, with seeded parameters; None for a case of experts alone.

    The parameters are the same on all ranks. Projections are drawn from N(0, 1/fan-in), so that logits and intermediate
    values are near 1. The first projection of the shared experts is multiplied by `case.gain`.
    """
    fields = block_of(case.subject, case.model)
    if fields is None:
        return None
    generator = torch.Generator(device).manual_seed((case.seed + 3) % 2**32)
    dtype = getattr(torch, case.dtype)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(std=std, generator=generator)

    dim, shared = case.dim, fields.get("n_shared_experts", 0)
    parameters = {"router.weight": normal(case.n_routed_experts, dim, dim**-0.5)}
    if shared:
        inter = shared * case.moe_inter_dim
        parameters["shared_experts.gate_and_up_proj"] = normal(dim, shared * width(case), case.gain * dim**-0.5)
        parameters["shared_experts.down_proj"] = normal(inter, dim, inter**-0.5)
    if fields.get("shared_expert_gate"):
        parameters["shared_experts.gate"] = normal(dim, 1, dim**-0.5)
    bias_E = torch.empty(case.n_routed_experts, device=device) if fields.get("correction_bias") else None
    if bias_E is not None:
        bias_E.normal_(std=BIAS_STD, generator=generator)
    return Around(case, fields, parameters, bias_E)
