"""Compute the size that each sum of an expert layer has by chance: the root of the sum of its squared terms.

A sum whose terms happen to cancel is smaller than that, but its rounding error is not. An error is therefore never
divided by less than the size by chance, so that cancellation accuses nobody.
"""

from torch import Tensor

from moebench.parity.oracle import Values
from moebench.parity.rounding import Operands


def sizes_by_chance(operands: Operands, values: Values, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the size by chance of `output` and, if `grads` has gradients, of the gradient of every operand by name.

    The sizes of `output` and `x` are [G, M, D], and those of `weights` are [G, M]. All of them are squared, because a
    token adds up several experts. The sizes of parameters are [G], and are not squared.
    """
    up_GDH, down_GID = operands.experts["gate_and_up_projs"], operands.experts["down_projs"]
    weights_GM1 = operands.weights_GM.unsqueeze(-1)
    y_GMD = values.a.square() @ down_GID.square()  # without the routing weight
    if "down_proj_bias" in operands.experts:
        y_GMD = y_GMD + operands.experts["down_proj_bias"].square().unsqueeze(1)
    sizes = {"output": y_GMD * weights_GM1.square()}
    if not grads:
        return sizes
    grad_h, grad_y = grads["h"].square().sum(-1), operands.grad_GMD.square().sum(-1)
    weighted_a = (values.a * weights_GM1).square().sum(-1)
    sizes["x"] = grads["h"].square() @ up_GDH.square().transpose(1, 2)
    sizes["weights"] = (y_GMD * operands.grad_GMD.square()).sum(-1)
    sums = {
        "gate_and_up_projs": operands.x_GMD.square().sum(-1) * grad_h,
        "down_projs": weighted_a * grad_y,
        "gate_up_proj_bias": grad_h,
        "down_proj_bias": operands.weights_GM.square() * grad_y,
    }
    return sizes | {name: sums[name].sum(1).sqrt() for name in operands.experts}
