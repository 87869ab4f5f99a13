"""Compute the gradients of the weights in the backward of `experts.compute.whole`, or add them to main gradients."""

from typing import TYPE_CHECKING

from torch import Tensor

from experts.steps import Steps

if TYPE_CHECKING:
    from experts.compute.whole import Plan


def grad_of_up(tokens: Tensor, grad_h_NH: Tensor, plan: "Plan", steps: Steps) -> Tensor | None:
    """Return the gradient [L, D, H] of the up projection's weights, or None if it was added to the main gradient.

    `tokens` are [T, D], or the rows that were kept.
    """
    if plan.main_grads is not None:
        main_grad = plan.main_grads.gate_and_up_projs
        assert plan.products.add_outer is not None
        assert main_grad is not None
        plan.products.add_outer(tokens, grad_h_NH, main_grad(), None if plan.save == "time" else "left")
        return None
    if plan.save == "time":
        return plan.products.outer(tokens, grad_h_NH)
    if plan.products.gathered_outer is not None:
        return plan.products.gathered_outer(tokens, grad_h_NH)
    return plan.products.outer(steps.gather_rows(tokens, plan.permutation), grad_h_NH)


def grad_of_down(a_NI: Tensor, grad: Tensor, plan: "Plan", steps: Steps, are_rows: bool = False) -> Tensor | None:
    """Return the gradient [L, I, D] of the down projection's weights, or None if it was added to the main gradient.

    `grad` is the output's gradient [T, D] or, with `are_rows`, its rows [N, D].
    """
    if plan.main_grads is not None:
        main_grad = plan.main_grads.down_projs
        assert plan.products.add_outer is not None
        assert main_grad is not None
        plan.products.add_outer(a_NI, grad, main_grad(), None if are_rows else "right")
        return None
    if are_rows:
        return plan.products.outer(a_NI, grad)
    if plan.products.outer_gathered is not None:
        return plan.products.outer_gathered(a_NI, grad)
    return plan.products.outer(a_NI, steps.gather_rows(grad, plan.permutation))
