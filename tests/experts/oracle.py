"""The oracle: what an expert layer must return, computed in float64, one token and one choice at a time.

The code follows the formulas of docs/concepts.md in the plainest way, and shares nothing with the package `experts`.
Autograd computes the gradients through these loops.
"""

import math

import torch
from torch import Tensor

PARAMETERS = ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias")


def activation(
    name: str, h: Tensor, *, alpha: float = 1.702, limit: float = 7.0, swiglu_limit: float = 0.0, offset: float = 1.0
) -> Tensor:
    """Return the activation [I] of one row h [2I] ([I] for relu2), without the routing weight."""
    if name == "relu2":
        return torch.stack([value * value if value > 0 else value * 0 for value in h])
    inter = len(h) // 2
    interleaved = name == "quick_geglu"
    gates = [h[2 * i] if interleaved else h[i] for i in range(inter)]
    ups = [h[2 * i + 1] if interleaved else h[inter + i] for i in range(inter)]
    return torch.stack([_glu(name, g, u, alpha, limit, swiglu_limit, offset) for g, u in zip(gates, ups, strict=True)])


def _glu(name: str, gate: Tensor, up: Tensor, alpha: float, limit: float, swiglu_limit: float, offset: float) -> Tensor:
    if name == "geglu":
        return gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if name == "swiglu":
        if swiglu_limit > 0:
            gate, up = _clip(gate, -math.inf, swiglu_limit), _clip(up, -swiglu_limit, swiglu_limit)
        return gate / (1 + torch.exp(-gate)) * up
    assert name in ("quick_geglu", "swigluoai"), name
    gate, up = _clip(gate, -math.inf, limit), _clip(up, -limit, limit)
    return gate / (1 + torch.exp(-alpha * gate)) * (up + offset)


def _clip(value: Tensor, low: float, high: float) -> Tensor:
    return value * 0 + low if value < low else value * 0 + high if value > high else value


def layer(
    name: str,
    x: Tensor,
    token_mask: Tensor,
    weights: Tensor,
    indices: Tensor,
    parameters: dict[str, Tensor],
    **limits: float,
) -> Tensor:
    """Return the layer's output [T, D]; all floats are float64. Masked tokens and choices of index −1 are not read."""
    up, down = parameters["gate_and_up_projs"], parameters["down_projs"]
    out = []
    for t in range(x.shape[0]):
        token = torch.zeros(down.shape[2], dtype=torch.float64)
        for k in range(indices.shape[1]):
            expert = int(indices[t, k])
            if not token_mask[t] or expert < 0:
                continue
            h = x[t] @ up[expert]
            if "gate_up_proj_bias" in parameters:
                h = h + parameters["gate_up_proj_bias"][expert]
            y = activation(name, h, **limits) @ down[expert]
            if "down_proj_bias" in parameters:
                y = y + parameters["down_proj_bias"][expert]
            token = token + weights[t, k] * y
        out.append(token)
    return torch.stack(out) if out else x.new_zeros(0, down.shape[2])


def output_and_gradients(
    name: str,
    x: Tensor,
    token_mask: Tensor,
    weights: Tensor,
    indices: Tensor,
    parameters: dict[str, Tensor],
    grad: Tensor,
    **limits: float,
) -> dict[str, Tensor]:
    """Return `output` and the gradients of `x`, `weights` and every parameter by name, all float64 on the CPU."""
    leaves = {
        key: value.detach().to("cpu", torch.float64).requires_grad_()
        for key, value in {"x": x, "weights": weights, **parameters}.items()
    }
    inner = {key: leaves[key] for key in parameters}
    output = layer(name, leaves["x"], token_mask.cpu(), leaves["weights"], indices.cpu(), inner, **limits)
    gradients = [None] * len(leaves)
    if output.requires_grad:
        gradients = torch.autograd.grad(output, list(leaves.values()), grad.to(output), allow_unused=True)
    filled = (torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves.values(), gradients, strict=True))
    return {"output": output.detach(), **dict(zip(leaves, filled, strict=True))}
