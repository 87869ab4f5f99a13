"""Compute the local experts as one autograd function, which decides what to keep for backward.

The function is for engines that supply their matrix products as `Products`. Forward keeps the tokens, the up
projection's output before the activation, and the permutation. It keeps neither the down projection's input nor its
output. Backward recomputes the activation while it computes the gradient of the activation's input. It writes them over
the memory that it reads, or the activation into memory that was not taken before, and frees each buffer at the buffer's
last use. If
`torch.autograd.graph.saved_tensors_hooks` or checkpointing made the saved tensors, backward copies what it overwrites.
With `Plan.main_grads`, backward adds the gradients of the weights there and returns none of them.

`save` decides about the gathered rows:

- "memory": backward reads the tokens' rows and the rows of the output's gradient in place, or gathers them again each
  time that a product needs them.
- "time": forward keeps the tokens' rows for backward, and backward keeps the rows of the output's gradient until it has
  used them for the last time.

The gradient of a routing weight is Σ_i da_i·a_i, where a is the activation before weighting and da is the gradient of
the weighted activation. The formula also holds if the weight is applied after the down projection, because every step
after the activation is linear. So the same backward serves both places of the routing weight.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts.autocast import without_autocast
from experts.compute import ExpertParameters, MainGrads
from experts.compute.weight_grads import grad_of_down, grad_of_up
from experts.config import MoEConfig, Save
from experts.steps import Permutation, Steps, steps_on


class Products(NamedTuple):
    """The matrix products of rows that are grouped by expert.

    Rows past the last group may hold anything, in operands and in results. The products run outside of autograd. Each
    product returns newly allocated memory. `outer` returns zeros for an expert without rows. A product that an engine
    does not have is None.
    """

    rows: Callable[[Tensor, Tensor], Tensor]  # a [N, P], b [L, P, Q] -> [N, Q]: each row times its expert's matrix
    rows_back: Callable[[Tensor, Tensor], Tensor]  # a [N, Q], b [L, P, Q] -> [N, P]: each row times the transpose
    outer: Callable[[Tensor, Tensor], Tensor]  # a [N, P], b [N, Q] -> [L, P, Q]: aᵀ·b of each expert's rows
    #: x [T, P], b [L, P, Q] -> [N, Q]: what `rows` returns for the tokens' rows; it reads x in place
    gathered: Callable[[Tensor, Tensor], Tensor] | None = None
    #: g [T, Q], b [L, P, Q] -> [N, P]: what `rows_back` returns for the tokens' rows; it reads g in place
    gathered_back: Callable[[Tensor, Tensor], Tensor] | None = None
    #: x [T, P], b [N, Q] -> [L, P, Q]: what `outer` returns for the tokens' rows as a; it reads x in place
    gathered_outer: Callable[[Tensor, Tensor], Tensor] | None = None
    #: a [N, P], x [T, Q] -> [L, P, Q]: what `outer` returns for the tokens' rows as b; it reads x in place
    outer_gathered: Callable[[Tensor, Tensor], Tensor] | None = None
    #: x [T, D], b [L, D, H], weights [T, K] or None, bias [L, H] or None -> [N, I]: the weighted activation of
    #: `gathered`'s result plus the bias
    activated: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor] | None = None
    #: The arguments of `activated` -> `gathered`'s result h [N, H] and the weighted activation [N, I]; or None if no
    #: kernel returns both
    kept_and_activated: (
        Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor] | None] | None
    ) = None
    #: g [T, D], b [L, I, D], h [N, H], weights [T, K], bias [L, H] or None -> the weighted activation [N, I] and the
    #: weights' gradient [T, K], and h is overwritten with its gradient; or None if no kernel computes all of them
    activated_back: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor] | None] | None = (
        None
    )
    #: a [N, P], b [N, Q], out [L, P, Q] float32, None: add to out what `outer` returns, before it is rounded. With
    #: "left" or "right", a or b is the tokens [T, …], which are read in place.
    add_outer: Callable[[Tensor, Tensor, Tensor, Literal["left", "right"] | None], None] | None = None


@dataclass(frozen=True)
class Plan:
    """The arguments of `whole_experts` that do not get gradients."""

    permutation: Permutation
    config: MoEConfig
    products: Products
    save: Save
    main_grads: MainGrads | None = None  # only if the products have `add_outer`

    @property
    def after(self) -> bool:
        """Whether the routing weight is applied after the down projection."""
        return self.config.apply_router_weight_after_down


def needs_gradients(x_TD: Tensor, weights_TK: Tensor, parameters: ExpertParameters) -> bool:
    """Return whether autograd will need the gradient of one of the tensors."""
    tensors = (x_TD, weights_TK, *parameters)
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def whole_experts(x_TD: Tensor, weights_TK: Tensor, parameters: ExpertParameters, plan: Plan) -> Tensor:
    """Return the local experts' sum [T, D] in x's dtype.

    x: [T, D]; weights: [T, K]. The parameters must have x's dtype. Gradients flow to x, weights and parameters. The
    gradients cannot be differentiated again.
    """
    if needs_gradients(x_TD, weights_TK, parameters):
        whole: Tensor = _WholeExperts.apply(x_TD, weights_TK, *parameters, plan)
        return whole
    return run_forward(x_TD, weights_TK, parameters, plan, keep=False)[0]


def run_forward(
    x_TD: Tensor, weights_TK: Tensor, parameters: ExpertParameters, plan: Plan, keep: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return the output [T, D] and, with `keep`, what backward needs: tokens or their rows, and the up projection.

    Runs outside of autograd. With `save` = "time", backward needs the rows, and otherwise the tokens.
    """
    gate_and_up, down, up_bias, down_bias = parameters
    permutation = plan.permutation
    steps = steps_on(x_TD.device, x_TD.dtype)
    inside_TK = None if plan.after else weights_TK
    kept = None
    if plan.products.activated is not None and not keep:
        a_NI = plan.products.activated(x_TD, gate_and_up, inside_TK, up_bias)
    else:
        are_rows = keep and plan.save == "time"
        tokens = steps.gather_rows(x_TD, permutation) if are_rows else x_TD
        both = None
        if plan.products.kept_and_activated is not None and not are_rows:
            both = plan.products.kept_and_activated(x_TD, gate_and_up, inside_TK, up_bias)
        if both is None:
            h_NH = project_up(tokens, are_rows, gate_and_up, plan, steps)
            both = h_NH, steps.activate(h_NH, permutation, inside_TK, up_bias, plan.config)
        h_NH, a_NI = both
        kept = (tokens, h_NH) if keep else None
        del tokens, h_NH, both
    y_ND = plan.products.rows(a_NI, down)
    del a_NI
    weights = weights_TK if plan.after or down_bias is not None else None
    return steps.sum_rows(y_ND, permutation, weights, down_bias, plan.after), kept


class _WholeExperts(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        gate_and_up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        parameters = ExpertParameters(gate_and_up, down, up_bias, down_bias)
        out_TD, kept = run_forward(x_TD, weights_TK, parameters, plan, keep=True)
        assert kept is not None
        ctx.save_for_backward(*kept, weights_TK, *parameters)
        ctx.plan = plan
        ctx.storage_of_h = weakref.ref(kept[1].untyped_storage())
        return out_TD

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        tokens, h_NH, weights_TK, *parameters = ctx.saved_tensors
        plan: Plan = ctx.plan
        made = memory_of(h_NH, ctx.storage_of_h)
        if made is None:  # a hook made h and may need its values again
            h_NH, tokens = h_NH.clone(memory_format=torch.contiguous_format), with_plain_strides(tokens)
        elif made.nbytes() == 0:  # an earlier backward of the same graph (retain_graph) freed h
            steps = steps_on(grad_TD.device, grad_TD.dtype)
            h_NH = project_up(tokens, plan.save == "time", parameters[0], plan, steps)
        wanted = Wanted(*ctx.needs_input_grad[:6])
        if plan.main_grads is not None:  # torch.autograd.grad of other tensors must leave them as they are
            of_up, of_down = (_runs(node) for node, _ in ctx.next_functions[2:4])
            wanted = wanted._replace(gate_and_up=of_up, down=of_down)
        return *run_backward(grad_TD, tokens, h_NH, weights_TK, ExpertParameters(*parameters), plan, wanted), None


def _runs(node: Any) -> bool:
    """Return whether the backward pass that is running now also runs a node of the graph."""
    return node is not None and bool(torch._C._will_engine_execute_node(node))


def memory_of(saved: Tensor, made: "weakref.ref[torch.UntypedStorage]") -> torch.UntypedStorage | None:
    """Return the memory of a saved tensor if it is still the memory that forward made; None if a hook made it."""
    storage = made()
    return storage if storage is not None and storage is saved.untyped_storage() else None


class Wanted(NamedTuple):
    """Whether autograd needs the gradient of each tensor."""

    x: bool
    weights: bool
    gate_and_up: bool
    down: bool
    up_bias: bool
    down_bias: bool


def run_backward(
    grad_TD: Tensor,
    tokens: Tensor,
    h_NH: Tensor,
    weights_TK: Tensor,
    parameters: ExpertParameters,
    plan: Plan,
    wanted: Wanted,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weights and the parameters. Overwrites h and frees h's memory."""
    gate_and_up, down, up_bias, down_bias = parameters
    permutation, products = plan.permutation, plan.products
    steps = steps_on(grad_TD.device, grad_TD.dtype)
    grad_x = grad_up = grad_down = grad_up_bias = grad_down_bias = None

    grad_ND = at_once = None
    a_NI: Tensor | None
    grad_weights: Tensor | None
    reads_tokens = plan.save == "memory" and not wanted.down_bias
    if products.activated_back is not None and reads_tokens:
        at_once = products.activated_back(grad_TD, down, h_NH, weights_TK, up_bias)
    if at_once is not None:
        grad_h_NH, (a_NI, grad_weights) = h_NH, at_once
    else:
        if products.gathered_back is not None and reads_tokens:
            grad_NI = products.gathered_back(grad_TD, down)
        else:
            grad_ND = steps.gather_rows(grad_TD, permutation)
            if wanted.down_bias:
                grad_down_bias = steps.sum_by_expert(grad_ND, permutation, weights_TK)
            grad_NI = products.rows_back(grad_ND, down)
        grad_h_NH, a_NI, grad_weights = steps.activate_backward(
            h_NH, grad_NI, permutation, weights_TK, up_bias, plan.config, again=True
        )
        del grad_NI
    kept_ND = grad_ND if plan.save == "time" else None
    del grad_ND, at_once
    assert a_NI is not None
    assert grad_weights is not None
    if down_bias is not None and wanted.weights:
        grad_weights += steps.dot_rows(grad_TD, permutation, None, down_bias)

    if kept_ND is not None:
        grad_down = grad_of_down(a_NI, kept_ND, plan, steps, are_rows=True) if wanted.down else None
        kept_ND = a_NI = None
    if wanted.up_bias:
        grad_up_bias = steps.sum_by_expert(grad_h_NH, permutation)
    if wanted.gate_and_up:
        grad_up = grad_of_up(tokens, grad_h_NH, plan, steps)
    if wanted.x:
        grad_x = steps.sum_rows(products.rows_back(grad_h_NH, gate_and_up), permutation)
    del grad_h_NH
    h_NH.untyped_storage().resize_(0)  # otherwise the graph holds h until backward ends
    if a_NI is not None and wanted.down:
        grad_down = grad_of_down(a_NI, grad_TD, plan, steps)
    return grad_x, grad_weights.to(weights_TK.dtype), grad_up, grad_down, grad_up_bias, grad_down_bias


def project_up(tokens: Tensor, are_rows: bool, gate_and_up: Tensor, plan: Plan, steps: Steps) -> Tensor:
    """Return the up projection [N, H] of the tokens [T, D] or, with `are_rows`, of the tokens' rows [N, D]."""
    if are_rows:
        return plan.products.rows(tokens, gate_and_up)
    if plan.products.gathered is not None:
        return plan.products.gathered(tokens, gate_and_up)
    return plan.products.rows(steps.gather_rows(tokens, plan.permutation), gate_and_up)


def with_plain_strides(tensor: Tensor) -> Tensor:
    """Return the values with the strides of a new tensor. `contiguous` leaves those of an empty tensor."""
    return tensor.contiguous() if tensor.numel() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
