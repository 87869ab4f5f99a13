"""Compute the size that each sum of an expert layer has by chance: the root of the sum of its squared terms.

A sum whose terms happen to cancel is smaller than that, but its rounding error is not. An error is therefore never
divided by less than the size by chance, so that cancellation accuses nobody.

An activation far in its tail is nearly zero, and some right formulas round it to a share of gate·up. An activation
therefore counts as at least the share TAIL of gate·up.

A projection with adapters is a sum, too: of the frozen weights and the products of the adapters.
"""

from torch import Tensor

from moebench.parity.oracle import ADAPTERS, PARAMETER_NAMES, Formula, Values, arguments, effective, trained
from moebench.parity.rounding import Operands

#: sigmoid(gate) is below this share where gate is below about -1.
TAIL = 0.25


def sizes_by_chance(
    formula: Formula, operands: Operands, values: Values, grads: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the size by chance of `output` and, if `grads` has gradients, of the gradient of every operand by name.

    The sizes of `output` and `x` are [G, M, D], and those of `weights` are [G, M]. All of them are squared, because a
    token adds up several experts. The sizes of parameters are [G], and are not squared.
    """
    experts, scale = operands.experts, formula.lora_scale
    squares = {name: stacked.square() for name, stacked in experts.items()}
    up_GDH, down_GID = (effective(squares, name, scale**2) for name in PARAMETER_NAMES[:2])
    weights_GM1 = operands.weights_GM.unsqueeze(-1)
    gate_GMI, up_GMI = arguments(formula, values.h)
    a_GMI = values.a.square().maximum((TAIL * gate_GMI * up_GMI).square())
    y_GMD = a_GMI @ down_GID  # without the routing weight
    if "down_proj_bias" in experts:
        y_GMD = y_GMD + squares["down_proj_bias"].unsqueeze(1)
    sizes = {"output": y_GMD * weights_GM1.square()}
    if not grads:
        return sizes
    grad_y = operands.grad_GMD.square().sum(-1)
    grad_a_GMI = (operands.grad_GMD.square() @ down_GID.transpose(1, 2)) * weights_GM1.square()
    slope_GMI = (TAIL * up_GMI * (1 + gate_GMI.abs())).square() + (TAIL * gate_GMI).square()
    tail_GM1 = (grad_a_GMI * slope_GMI).mean(-1, keepdim=True) * TAIL
    grad_h_GMH = grads["h"].square().maximum(tail_GM1)
    sizes["x"] = grad_h_GMH @ up_GDH.transpose(1, 2)
    sizes["weights"] = (y_GMD * operands.grad_GMD.square()).sum(-1)
    grad_h = grad_h_GMH.sum(-1)
    sums = {
        "gate_and_up_projs": operands.x_GMD.square().sum(-1) * grad_h,
        "down_projs": (a_GMI * weights_GM1.square()).sum(-1) * grad_y,
        "gate_up_proj_bias": grad_h,
        "down_proj_bias": operands.weights_GM.square() * grad_y,
    }
    if scale:
        grad_y_GMD, weighted_GMI = operands.grad_GMD.square(), a_GMI * weights_GM1.square()
        rows = {"gate_and_up_projs": (operands.x_GMD.square(), grad_h_GMH), "down_projs": (weighted_GMI, grad_y_GMD)}
        for projection, (name_A, name_B) in ADAPTERS.items():
            inputs, grads_of_rows = rows[projection]
            thin = inputs @ squares[name_A]
            grad_thin = grads_of_rows @ squares[name_B].transpose(1, 2)
            sums[name_A] = scale**2 * inputs.sum(-1) * grad_thin.sum(-1)
            sums[name_B] = scale**2 * thin.sum(-1) * grads_of_rows.sum(-1)
    return sizes | {name: sums[name].sum(1).sqrt() for name in trained(experts)}
