"""Compute the local experts with matrix products in FP8, as one autograd function.

The products of the forward pass and those that compute the gradients of rows are in FP8. Those that compute the
gradients of the weights are in FP8 or in the dtype of x. In FP8 their operands are quantised once more, because they
sum over rows, and a scale must not change within a sum of the tensor cores.
What is multiplied is quantised where it is made: the tokens while their rows are gathered, the activation and its
gradient in the kernels that compute them. Forward keeps the tokens and the up projection's output, as
`experts.compute.whole` does.

Tokens, and the gradients of the output, may come from other ranks in FP8 already (`experts.fp8.tokens`). Then their
rows are gathered as they are, and the products for the gradients of the weights read them in 16 bits.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts.activations import activation_form
from experts.autocast import without_autocast
from experts.compute import ExpertParameters
from experts.compute.weight_grads import grad_of_down, grad_of_up
from experts.compute.whole import Plan, Wanted, memory_of, needs_gradients, with_plain_strides
from experts.fp8 import activation, gradients, products, quantise
from experts.fp8.blocks import E4M3, Matrices, Rows, up_halves
from experts.fp8.cache import Weights
from experts.fp8.tokens import Fp8Tokens, in_16_bits
from experts.fp8.turned import RowBlocks, TurnedRows, row_blocks, turn
from experts.steps import steps_on


@dataclass(frozen=True)
class Fp8Plan:
    """The arguments of `fp8_experts` that do not get gradients.

    `weights` are the weights in FP8, and `gradients` is the format of gradients. `weight_gradients` is whether the
    products for the gradients of the weights are in FP8, too. If not, `plan` has these products. `product` is a
    library's product of rows, with the arguments of `multiply`; None for those of this package.
    """

    plan: Plan
    weights: Weights
    gradients: torch.dtype = E4M3
    weight_gradients: bool = True
    product: Callable[[Rows, Matrices, torch.dtype], Tensor] | None = None

    def multiply(self, rows: Rows, matrices: Matrices, dtype: torch.dtype) -> Tensor:
        """Return each row times the transpose of its expert's matrix."""
        if self.product is not None:
            return self.product(rows, matrices, dtype)
        permutation, config = self.plan.permutation, self.plan.config
        return products.product(rows, matrices, permutation, permutation.num_rows / config.n_routed_experts, dtype)


def fp8_experts(x_TD: Tensor, weights_TK: Tensor, parameters: ExpertParameters, plan: Fp8Plan) -> Tensor:
    """Return the local experts' sum [T, D] in x's dtype.

    x: [T, D], bfloat16, float16 or `Fp8Tokens`; weights: [T, K]. The parameters must have x's dtype. Gradients flow to
    x, weights and parameters. The gradients cannot be differentiated again.
    """
    if needs_gradients(x_TD, weights_TK, parameters):
        whole: Tensor = _Fp8Experts.apply(x_TD, weights_TK, *parameters, plan)
        return whole
    return _forward(x_TD, weights_TK, parameters, plan)[0]


def _project_up(x_TD: Tensor, plan: Fp8Plan) -> Tensor:
    rows = quantise.quantise_and_gather(x_TD, plan.plan.permutation)
    return plan.multiply(rows, plan.weights.up(), x_TD.dtype)


def _forward(
    x_TD: Tensor, weights_TK: Tensor, parameters: ExpertParameters, plan: Fp8Plan, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the output [T, D] and, with `keep`, the up projection [N, H]."""
    permutation, after, config = plan.plan.permutation, plan.plan.after, plan.plan.config
    inside_TK = None if after else weights_TK
    rows: Rows | None = quantise.quantise_and_gather(x_TD, permutation)
    assert rows is not None
    a_NI = kept = None
    up = plan.weights.up()
    if not keep and parameters.gate_up_proj_bias is None and plan.product is None:
        form, per_expert = activation_form(config), permutation.num_rows / config.n_routed_experts
        a_NI = products.activated_product(rows, up, permutation, per_expert, inside_TK, form, x_TD.dtype)
    if a_NI is None:
        h_NH = plan.multiply(rows, up, x_TD.dtype)
        rows = None
        a_NI = activation.activate(h_NH, permutation, inside_TK, parameters.gate_up_proj_bias, config)
        kept = h_NH if keep else None
        del h_NH
    del rows, up
    y_ND = plan.multiply(a_NI, plan.weights.down(), x_TD.dtype)
    del a_NI
    down_bias = parameters.down_proj_bias
    weights = weights_TK if after or down_bias is not None else None
    steps = steps_on(x_TD.device, x_TD.dtype)
    return steps.sum_rows(y_ND, permutation, weights, down_bias, after), kept


class _Fp8Experts(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        gate_and_up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        plan: Fp8Plan,
    ) -> Tensor:
        parameters = ExpertParameters(gate_and_up, down, up_bias, down_bias)
        out_TD, h_NH = _forward(x_TD, weights_TK, parameters, plan, keep=True)
        assert h_NH is not None
        plan.weights.end_forward()
        tokens = (x_TD.quantised, x_TD.scales) if isinstance(x_TD, Fp8Tokens) else (x_TD, None)
        ctx.save_for_backward(*tokens, h_NH, weights_TK, *parameters)
        ctx.plan = plan
        ctx.storage_of_h = weakref.ref(h_NH.untyped_storage())
        return out_TD

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        # reading the saved parameters raises if somebody has overwritten them since
        x_TD, scales, h_NH, weights_TK, *parameters = ctx.saved_tensors
        plan: Fp8Plan = ctx.plan
        made = memory_of(h_NH, ctx.storage_of_h)
        if made is None:  # a hook made h and may need its values again
            h_NH, x_TD = h_NH.clone(memory_format=torch.contiguous_format), with_plain_strides(x_TD)
            scales = None if scales is None else with_plain_strides(scales)
        if scales is not None:
            x_TD = Fp8Tokens(x_TD, scales, grad_TD.dtype)
        if made is not None and made.nbytes() == 0:  # an earlier backward of the same graph (retain_graph) freed h
            h_NH = _project_up(x_TD, plan)
        wanted = Wanted(*ctx.needs_input_grad[:6])
        return *_backward(grad_TD, x_TD, h_NH, weights_TK, ExpertParameters(*parameters), plan, wanted), None


def _backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    h_NH: Tensor,
    weights_TK: Tensor,
    parameters: ExpertParameters,
    plan: Fp8Plan,
    wanted: Wanted,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weights and the parameters. May overwrite h, and frees h's memory."""
    _, _, up_bias, down_bias = parameters
    permutation, config, dtype = plan.plan.permutation, plan.plan.config, grad_TD.dtype
    steps = steps_on(grad_TD.device, dtype)
    grad_x = grad_up = grad_down = grad_up_bias = grad_down_bias = None

    rows = quantise.quantise_and_gather(grad_TD, permutation, plan.gradients)
    if down_bias is not None:
        grad_TD = in_16_bits(grad_TD)
    if wanted.down_bias:
        grad_ND = steps.gather_rows(grad_TD, permutation)
        grad_down_bias = steps.sum_by_expert(grad_ND, permutation, weights_TK)
        del grad_ND
    grad_NI = plan.multiply(rows, plan.weights.down_back(), dtype)
    del rows
    blocks = row_blocks(permutation) if plan.weight_gradients else None
    turning = blocks if wanted.gate_and_up and wanted.down else None
    rows, grad_weights, grad_h_NH, a_NI, turned_h, turned_a = _activate_backward(
        h_NH, grad_NI, weights_TK, up_bias, plan, turning
    )
    del grad_NI
    if down_bias is not None and wanted.weights:
        grad_weights += steps.dot_rows(grad_TD, permutation, None, down_bias)
    if wanted.up_bias:
        assert grad_h_NH is not None
        grad_up_bias = steps.sum_by_expert(grad_h_NH, permutation)
    if wanted.x:  # first, so that the rows in FP8 are freed before the gradients of the weights are allocated
        dx_ND = plan.multiply(rows, plan.weights.up_back(), dtype)
        grad_x = steps.sum_rows(dx_ND, permutation)
        del dx_ND
    del rows
    if blocks is not None:
        # first, so that h and the activation are freed before the gradients of the weights are allocated
        halves = up_halves(config)
        if grad_h_NH is not None and wanted.gate_and_up:
            turned_h = turn(
                grad_h_NH, blocks, permutation, gather=False, by_column=False, halves=halves, dtype=plan.gradients
            )
        del grad_h_NH
        h_NH.untyped_storage().resize_(0)
        if a_NI is not None and wanted.down:
            turned_a = turn(a_NI, blocks, permutation, gather=False, by_column=True)
        del a_NI
        if turned_h is not None:
            grad_up = gradients.grad_of_up(in_16_bits(x_TD), turned_h, permutation, blocks, halves)
        del turned_h
        if turned_a is not None:
            grad_TD = in_16_bits(grad_TD)
            freed = h_NH.shape[1] + (grad_TD.shape[1] if wanted.x else 0)  # the gradients of h and of the tokens
            grad_down = gradients.grad_of_down(turned_a, grad_TD, permutation, blocks, plan.gradients, freed)
    else:
        assert grad_h_NH is not None
        assert a_NI is not None
        if wanted.gate_and_up:
            grad_up = grad_of_up(in_16_bits(x_TD), grad_h_NH, plan.plan, steps)
        del grad_h_NH
        h_NH.untyped_storage().resize_(0)
        if wanted.down:
            grad_down = grad_of_down(a_NI, in_16_bits(grad_TD), plan.plan, steps)
    return grad_x, grad_weights.to(weights_TK.dtype), grad_up, grad_down, grad_up_bias, grad_down_bias


def _activate_backward(
    h_NH: Tensor,
    grad_NI: Tensor,
    weights_TK: Tensor,
    up_bias: Tensor | None,
    plan: Fp8Plan,
    blocks: RowBlocks | None,
) -> tuple[Rows, Tensor, Tensor | None, Tensor | None, TurnedRows | None, TurnedRows | None]:
    """Return the gradient of h in FP8, that of the routing weights, and what the gradients of the weights read.

    These are either the gradient of h and the activation in 16 bits, or both transposed in FP8, if `blocks` is given
    and one kernel computes all. Then h's memory is freed.
    """
    given = h_NH, grad_NI, plan.plan.permutation, weights_TK, up_bias, plan.plan.config, plan.gradients
    at_once = None
    if blocks is not None:
        at_once = activation.activate_backward_turned(*given, plan.weights.padded, blocks)
    if at_once is None:
        rows, grad_h_NH, a_NI, grad_weights = activation.activate_backward(*given, plan.weights.padded)
        return rows, grad_weights, grad_h_NH, a_NI, None, None
    rows, turned_h, turned_a, grad_weights = at_once
    h_NH.untyped_storage().resize_(0)  # otherwise the graph holds h until backward ends
    return rows, grad_weights, None, None, turned_h, turned_a
