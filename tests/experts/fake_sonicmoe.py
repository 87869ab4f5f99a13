"""A fake of SonicMoE's function for given routing, in plain torch.

Gate and up columns alternate, and (token, expert) pairs are sorted by token.
"""

import enum
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F


class ActivationType(enum.Enum):
    SWIGLU = "swiglu"
    GEGLU = "geglu"


def moe_general_routing_inputs(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    E: int,
    stream_id: int | None,
    activation_type: ActivationType,
    is_inference_mode_enabled: bool = False,
) -> tuple[Tensor, Tensor]:
    assert router_scores.shape == token_indices.shape == expert_indices.shape != (0,)
    assert token_indices.dtype is expert_indices.dtype is torch.int32
    assert (token_indices.diff() >= 0).all()
    assert 0 <= int(expert_indices.min()) <= int(expert_indices.max()) < E
    assert w1.permute(2, 0, 1).is_contiguous()
    assert w2.permute(2, 0, 1).is_contiguous()
    assert (b1 is None) is (b2 is None)
    assert is_inference_mode_enabled is not torch.is_grad_enabled()
    rows, experts = token_indices.long(), expert_indices.long()
    h = torch.einsum("ad,ida->ai", x[rows], w1[:, :, experts])
    h = h if b1 is None else h + b1[experts]
    gate, up = h[:, ::2], h[:, 1::2]
    gate = F.silu(gate) if activation_type is ActivationType.SWIGLU else F.gelu(gate, approximate="tanh")
    y = torch.einsum("ai,dia->ad", gate * up, w2[:, :, experts])
    y = y if b2 is None else y + b2[experts]
    output = torch.zeros_like(x).index_add(0, rows, (y * router_scores.unsqueeze(-1)).to(x.dtype))
    return output, experts.bincount(minlength=E)


def modules() -> dict[str, ModuleType]:
    """Return the fake modules by the name that `import` uses."""
    package, enums = ModuleType("sonicmoe"), ModuleType("sonicmoe.enums")
    package.moe_general_routing_inputs = moe_general_routing_inputs  # type: ignore[attr-defined]
    enums.ActivationType = ActivationType  # type: ignore[attr-defined]
    return {"sonicmoe": package, "sonicmoe.enums": enums}
