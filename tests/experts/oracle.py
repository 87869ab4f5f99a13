"""Ask moebench's oracle what an expert layer must return, in float64, with one expert at a time.

tests/moebench/parity/test_oracle.py checks that oracle against formulas written for one number at a time.
"""

import torch
from torch import Tensor

from moebench.parity import oracle
from moebench.parity.oracle import PARAMETER_NAMES, Formula

PARAMETERS = PARAMETER_NAMES


def _formula(name: str, alpha: float = 1.702, limit: float = 7.0, swiglu_limit: float = 0.0) -> Formula:
    limits = {"swiglu": swiglu_limit, "swigluoai": limit, "quick_geglu": limit}
    return Formula(name, alpha, limits.get(name, 0.0), weight_after_down=False)


def activation(name: str, h: Tensor, **limits: float) -> Tensor:
    """Return the activation [I] of one row h [2I] ([I] for relu2), without the routing weight.

    `limits` are alpha, limit and swiglu_limit; their defaults are those of MoEConfig.
    """
    return oracle.activation(_formula(name, **limits), h)


def output_and_gradients(
    name: str,
    x: Tensor,
    token_mask: Tensor,
    weights: Tensor,
    indices: Tensor,
    parameters: dict[str, Tensor],
    grad: Tensor,
    product: oracle.Product = torch.matmul,
    **limits: float,
) -> dict[str, Tensor]:
    """Return `output` and the gradients of `x`, `weights` and every parameter by name, all float64 on the CPU.

    Masked tokens and choices of index −1 are not read. `product` multiplies the matrices.
    """
    formula = _formula(name, **limits)
    x, weights, grad, token_mask, indices = (one.detach().cpu() for one in (x, weights, grad, token_mask, indices))
    doubles = {key: value.detach().to("cpu", torch.float64) for key, value in parameters.items()}
    found = {key: torch.zeros_like(value) for key, value in doubles.items()}
    output, grad_x = (torch.zeros(x.shape, dtype=torch.float64) for _ in range(2))
    grad_weights = torch.zeros(weights.shape, dtype=torch.float64)
    active = indices.long().masked_fill(~token_mask.unsqueeze(-1), -1)
    for expert in active[active >= 0].unique().tolist():
        tokens, choices = torch.where(active == expert)
        own = {key: value[expert : expert + 1] for key, value in doubles.items()}
        rows, row_weights, row_grads = x[tokens].double(), weights[tokens, choices].double(), grad[tokens].double()
        values, grads = oracle.gradients(formula, rows[None], row_weights[None], own, row_grads[None], product)
        output.index_add_(0, tokens, values.y[0])
        grad_x.index_add_(0, tokens, grads["x"][0])
        grad_weights[tokens, choices] = grads["weights"][0]
        for key in doubles:
            found[key][expert] = grads[key][0]
    return {"output": output, "x": grad_x, "weights": grad_weights, **found}
