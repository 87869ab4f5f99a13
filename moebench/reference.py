"""The loop path in float64 and in the case's own dtype, expert by expert, and how far passes of a backend are from it.

Only one expert's parameters and gradients are held in float64 at a time, so that the largest layers fit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.activations import accumulation_dtype
from experts.compute import ExpertParameters
from experts.compute.loop import expert_forward
from experts.modules import PARAMETER_NAMES
from moebench.case import Case
from moebench.inputs import Inputs, moe_config

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class GroupErrors:
    """Norms of one tensor's groups G: the rows of its tokens, or its experts.

    `scale_G` is what errors are measured against: the norm of the reference, floored where that is fair, and exactly
    zero where the tensor must be exactly zero. `loop_G` is the loop's own error, `passes_PG` that of each pass.
    """

    tensor: str
    group: str  # "token" or "expert"
    scale_G: Tensor
    loop_G: Tensor
    passes_PG: Tensor


def compare(case: Case, inputs: Inputs, parameters: Mapping[str, Tensor], passes: list[Tensors]) -> list[GroupErrors]:
    """Errors of every tensor of the passes: `output` and, in mode train, the gradients of x, weights and parameters."""
    sums = _Sums(case, inputs)
    by_expert = [_expert(index, case, inputs, parameters, passes, sums) for index in range(case.n_routed_experts)]
    inactive_TK = inputs.active_indices_TK < 0
    inactive_T1 = inactive_TK.all(dim=1, keepdim=True)
    errors = [_token_errors("output", sums, inactive_T1, passes)]
    if case.mode == "train":
        errors.append(_token_errors("x.grad", sums, inactive_T1, passes))
        errors.append(_token_errors("weights.grad", sums, inactive_TK, passes))
        for name in parameters:
            exact_G, loop_G, *passes_PG = torch.stack([norms[name] for norms in by_expert], dim=1)
            errors.append(GroupErrors(f"{name}.grad", "expert", exact_G, loop_G, torch.stack(passes_PG)))
    return errors


class _Sums:
    """Per-token tensors, summed over experts: `exact` in float64, `loop` as the loop sums them."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.dtypes = {
            "output": inputs.x_TD.dtype,
            "x.grad": inputs.x_TD.dtype,
            "weights.grad": inputs.weights_TK.dtype,
        }
        acc = accumulation_dtype(inputs.x_TD.dtype)
        like = {"output": inputs.x_TD, "x.grad": inputs.x_TD, "weights.grad": inputs.weights_TK}
        self.exact = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
        self.loop = {name: torch.zeros_like(tensor, dtype=acc) for name, tensor in like.items()}
        # A routing weight's gradient is a sum over D of terms that may cancel: this is its size by chance.
        self.chance_TK = torch.zeros_like(inputs.weights_TK, dtype=torch.float64)

    def add(self, sums: Tensors, run: Tensors, tokens_N: Tensor, choices_N: Tensor) -> None:
        for name, values in run.items():
            if name == "weights.grad":
                sums[name][tokens_N, choices_N] = values.to(sums[name].dtype)
            elif name in sums:
                sums[name].index_add_(0, tokens_N, values.to(sums[name].dtype))


def _expert(
    index: int, case: Case, inputs: Inputs, parameters: Mapping[str, Tensor], passes: list[Tensors], sums: _Sums
) -> Tensors:
    """Run one expert both ways. By parameter, norms [2 + P]: of its gradient, of the loop's error, of each pass's."""
    tokens_N, choices_N = torch.where(inputs.active_indices_TK == index)
    expert = {name: parameter[index] for name, parameter in parameters.items()}
    exact = _run_expert(case, inputs, expert, tokens_N, choices_N, torch.float64)
    loop = _run_expert(case, inputs, expert, tokens_N, choices_N, inputs.x_TD.dtype)
    sums.add(sums.exact, exact, tokens_N, choices_N)
    sums.add(sums.loop, loop, tokens_N, choices_N)
    if case.mode == "forward":
        return {}
    weights_N = inputs.weights_TK[tokens_N, choices_N].double()
    sizes_N = _norms(exact["output"]) * _norms(inputs.grad_TD[tokens_N].double()) / math.sqrt(case.dim)
    sums.chance_TK[tokens_N, choices_N] = sizes_N / weights_N
    norms = {}
    for name in parameters:
        found = [loop[name], *(tensors[f"{name}.grad"][index] for tensors in passes)]
        errors = [torch.linalg.vector_norm(one.double() - exact[name]) for one in found]
        norms[name] = torch.stack([torch.linalg.vector_norm(exact[name]), *errors])
    return norms


def _run_expert(
    case: Case, inputs: Inputs, expert: Mapping[str, Tensor], tokens_N: Tensor, choices_N: Tensor, dtype: torch.dtype
) -> Tensors:
    """Output [N, D] of one expert in `dtype` and, in mode train, every gradient by name."""
    train = case.mode == "train"
    leaves = {"x.grad": inputs.x_TD[tokens_N], "weights.grad": inputs.weights_TK[tokens_N, choices_N], **expert}
    leaves = {name: leaf.to(dtype).requires_grad_(train) for name, leaf in leaves.items() if name != "weights.grad"} | {
        "weights.grad": leaves["weights.grad"].to(accumulation_dtype(dtype)).requires_grad_(train)
    }
    stacked = ExpertParameters(*(leaves.get(name) for name in PARAMETER_NAMES))  # type: ignore[arg-type]
    output_ND = expert_forward(leaves["x.grad"], leaves["weights.grad"], stacked, moe_config(case).with_dtype(dtype))
    if not train:
        return {"output": output_ND}
    grad_ND = inputs.grad_TD[tokens_N].to(output_ND.dtype)
    grads = torch.autograd.grad(output_ND, list(leaves.values()), grad_ND)
    return {"output": output_ND.detach(), **dict(zip(leaves, grads, strict=True))}


def _token_errors(name: str, sums: _Sums, inactive: Tensor, passes: list[Tensors]) -> GroupErrors:
    """`inactive` [T, 1] or [T, K] marks what must be exactly zero."""
    exact, loop = sums.exact[name], sums.loop[name].to(sums.dtypes[name])
    scale_T = _norms(exact)
    if name == "weights.grad":
        scale_T = scale_T.maximum(_norms(sums.chance_TK))
    active_T = ~inactive.all(dim=1)
    root_mean_square = (scale_T.square().sum() / active_T.sum().clamp(min=1)).sqrt()
    scale_T = torch.where(active_T, scale_T.maximum(root_mean_square), 0.0)
    found = [tensors[name].double() for tensors in passes]
    errors = [torch.where(inactive & (one != 0), math.inf, one - exact) for one in found]
    return GroupErrors(name, "token", scale_T, _norms(loop.double() - exact), torch.stack([_norms(e) for e in errors]))


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms
