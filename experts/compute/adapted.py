"""Compute the local experts with low-rank adapters (LoRA) as one autograd function. The weights beside them are frozen.

The weight + scale · A @ B of an expert is never computed. Each projection is the product with the weight, plus two thin
products over the same sorted rows: rows @ A, times the scale, @ B. The engine supplies the products, as for
`experts.compute.whole`.

Forward keeps the tokens, the up projection's output before the activation, the thin product rows @ A of the up
projection, and the permutation. Backward computes the gradients of the adapters, the tokens and the routing weights. It
computes no gradient of a frozen weight, and forward keeps nothing that only such a gradient would need. As in
`experts.compute.whole`, backward recomputes the activation, writes over the memory that it reads, and copies what hooks
made.
"""

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from experts.autocast import without_autocast
from experts.compute import Adapters, ExpertParameters
from experts.compute.weight_grads import grad_of_down, grad_of_up
from experts.compute.whole import Plan, memory_of, project_up, with_plain_strides
from experts.steps import Steps, steps_on

#: The products take rows of a multiple of this many bytes.
ALIGNMENT_BYTES = 16


def adapted_experts(
    x_TD: Tensor, weights_TK: Tensor, parameters: ExpertParameters, adapters: Adapters, plan: Plan
) -> Tensor:
    """Return the local experts' sum [T, D] in x's dtype.

    x: [T, D]; weights: [T, K]. Parameters and adapters must have x's dtype. Gradients flow to x, weights and adapters,
    not to the parameters. The gradients cannot be differentiated again. Zeros fill a rank up to a multiple of 16 bytes.
    `plan.save` must be "memory".
    """
    adapters = _filled_up(adapters)
    tensors = (x_TD, weights_TK, *adapters.tensors)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        whole: Tensor = _AdaptedExperts.apply(*tensors, *parameters, adapters.scale, plan)
        return whole
    return _forward(x_TD, weights_TK, parameters, adapters, plan, keep=False)[0]


def _filled_up(adapters: Adapters) -> Adapters:
    """Return the adapters with zeros up to a rank whose rows the products take. The zeros change no result."""
    up_A, up_B, down_A, down_B = adapters.tensors
    missing = -up_A.shape[-1] % math.ceil(ALIGNMENT_BYTES / up_A.element_size())
    if missing == 0:
        return adapters
    columns, rows = (0, missing), (0, 0, 0, missing)
    return Adapters(adapters.scale, pad(up_A, columns), pad(up_B, rows), pad(down_A, columns), pad(down_B, rows))


def _forward(
    x_TD: Tensor, weights_TK: Tensor, parameters: ExpertParameters, adapters: Adapters, plan: Plan, keep: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return the output [T, D] and, with `keep`, what `_project_up` returns."""
    _, down, up_bias, down_bias = parameters
    permutation, rows = plan.permutation, plan.products.rows
    steps = steps_on(x_TD.device, x_TD.dtype)
    h_NH, u_NR = _project_up(x_TD, parameters, adapters, plan, steps)
    kept = (h_NH, u_NR) if keep else None
    a_NI = steps.activate(h_NH, permutation, None if plan.after else weights_TK, up_bias, plan.config)
    del h_NH, u_NR
    v_NR = rows(a_NI, adapters.down_A).mul_(adapters.scale)
    y_ND = rows(a_NI, down)
    del a_NI
    weights = weights_TK if plan.after or down_bias is not None else None
    out_TD = steps.sum_rows(y_ND, permutation, weights, down_bias, plan.after)
    del y_ND
    inside = weights_TK if plan.after else None
    out_TD += steps.sum_rows(rows(v_NR, adapters.down_B), permutation, inside, None, plan.after)
    return out_TD, kept


def _project_up(
    x_TD: Tensor, parameters: ExpertParameters, adapters: Adapters, plan: Plan, steps: Steps
) -> tuple[Tensor, Tensor]:
    """Return the up projection [N, 2I] (ungated [N, I]) with the adapters, and its scaled thin product [N, R]."""
    are_rows = plan.products.gathered is None
    tokens = steps.gather_rows(x_TD, plan.permutation) if are_rows else x_TD
    u_NR = project_up(tokens, are_rows, adapters.gate_and_up_A, plan, steps).mul_(adapters.scale)
    h_NH = project_up(tokens, are_rows, parameters.gate_and_up_projs, plan, steps)
    del tokens
    h_NH += plan.products.rows(u_NR, adapters.gate_and_up_B)
    return h_NH, u_NR


class _AdaptedExperts(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, *arguments: Any) -> Tensor:
        *matrices, gate_and_up, down, up_bias, down_bias, scale, plan = arguments
        adapters = Adapters(scale, *matrices)
        parameters = ExpertParameters(gate_and_up, down, up_bias, down_bias)
        out_TD, kept = _forward(x_TD, weights_TK, parameters, adapters, plan, keep=True)
        assert kept is not None
        ctx.save_for_backward(x_TD, *kept, weights_TK, *adapters.tensors, *parameters)
        ctx.scale, ctx.plan = scale, plan
        ctx.storage_of_h = weakref.ref(kept[0].untyped_storage())
        return out_TD

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, h_NH, u_NR, weights_TK, *others = ctx.saved_tensors
        adapters, parameters = Adapters(ctx.scale, *others[:4]), ExpertParameters(*others[4:])
        plan: Plan = ctx.plan
        made = memory_of(h_NH, ctx.storage_of_h)
        if made is None:  # a hook made h and may need its values again
            h_NH, x_TD = h_NH.clone(memory_format=torch.contiguous_format), with_plain_strides(x_TD)
        elif made.nbytes() == 0:  # an earlier backward of the same graph (retain_graph) freed h
            h_NH, u_NR = _project_up(x_TD, parameters, adapters, plan, steps_on(grad_TD.device, grad_TD.dtype))
        kept = _Kept(x_TD, h_NH, u_NR, weights_TK)
        grads = _backward(grad_TD, kept, adapters, parameters, plan, _Wanted(*ctx.needs_input_grad[:6]))
        return *grads, *[None] * (len(parameters) + 2)


class _Kept(NamedTuple):
    """What forward keeps for backward, besides weights."""

    x_TD: Tensor
    h_NH: Tensor  # the up projection before the activation
    u_NR: Tensor  # the scaled thin product of the up projection
    weights_TK: Tensor


class _Wanted(NamedTuple):
    """Whether autograd needs the gradient of each tensor."""

    x: bool
    weights: bool
    up_A: bool
    up_B: bool
    down_A: bool
    down_B: bool


def _backward(
    grad_TD: Tensor, kept: _Kept, adapters: Adapters, parameters: ExpertParameters, plan: Plan, wanted: _Wanted
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weights and the adapters. Overwrites h and frees h's memory."""
    x_TD, h_NH, u_NR, weights_TK = kept
    up_A, up_B, down_A, _ = adapters.tensors
    permutation, products, scale = plan.permutation, plan.products, adapters.scale
    steps = steps_on(grad_TD.device, grad_TD.dtype)
    grad_x = grad_up_A = grad_up_B = grad_down_A = grad_down_B = None

    grad_NI, grad_v_NR = _back_through_down(grad_TD, parameters.down_projs, adapters, plan, steps)
    grad_h_NH, a_NI, grad_weights = steps.activate_backward(
        h_NH, grad_NI, permutation, weights_TK, parameters.gate_up_proj_bias, plan.config, again=True
    )
    assert a_NI is not None
    assert grad_weights is not None
    del grad_NI
    if parameters.down_proj_bias is not None and wanted.weights:
        grad_weights += steps.dot_rows(grad_TD, permutation, None, parameters.down_proj_bias)
    if wanted.down_A:
        grad_down_A = products.outer(a_NI, grad_v_NR)
    if wanted.down_B:  # a has the routing weight here, also if forward applies it after the down projection
        grad_down_B = grad_of_down(products.rows(a_NI, down_A).mul_(scale), grad_TD, plan, steps)
    del a_NI, grad_v_NR

    if wanted.up_B:
        grad_up_B = products.outer(u_NR, grad_h_NH)
    grad_u_NR = products.rows_back(grad_h_NH, up_B).mul_(scale)
    if wanted.x:
        grad_x = steps.sum_rows(products.rows_back(grad_h_NH, parameters.gate_and_up_projs), permutation)
        grad_x += steps.sum_rows(products.rows_back(grad_u_NR, up_A), permutation)
    del grad_h_NH
    h_NH.untyped_storage().resize_(0)  # otherwise the graph holds h until backward ends
    if wanted.up_A:
        grad_up_A = grad_of_up(x_TD, grad_u_NR, plan, steps)
    return grad_x, grad_weights.to(weights_TK.dtype), grad_up_A, grad_up_B, grad_down_A, grad_down_B


def _back_through_down(
    grad_TD: Tensor, down: Tensor, adapters: Adapters, plan: Plan, steps: Steps
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the down projection's input [N, I], and of its thin product before the scale [N, R]."""
    back, grad = plan.products.gathered_back, grad_TD
    if back is None:
        back, grad = plan.products.rows_back, steps.gather_rows(grad_TD, plan.permutation)
    grad_v_NR = back(grad, adapters.down_B).mul_(adapters.scale)
    grad_NI = back(grad, down)
    del grad
    grad_NI += plan.products.rows_back(grad_v_NR, adapters.down_A)
    return grad_NI, grad_v_NR
