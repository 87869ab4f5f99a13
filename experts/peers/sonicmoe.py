"""Make a peer (another library's layer) of SonicMoE's function for a given routing.

SonicMoE's kernels gather the rows and apply the activation. They are for Hopper and Blackwell. SonicMoE's MoE module
cannot be the peer, because it routes with its own softmax and top-k kernel, which accepts neither weights nor indices.
SonicMoE applies the routing weight after the down projection and its bias. Applying the weight before the down
projection is the same function (see transformers_experts).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from experts import catalog
from experts.compute.grouped import no_rows
from experts.config import MoEConfig, dtype_name
from experts.errors import Unsupported
from experts.peers.layer import Kept, PeerExperts, Translated, not_installed, transposed

ACTIVATIONS = {"swiglu": "SWIGLU", "geglu": "GEGLU"}
ROW_ALIGNMENT_BYTES = 16


class Pairs(NamedTuple):
    """The A active pairs of a token and its expert, sorted by token.

    `places_A` holds each pair's index into the flattened [T·K] choices, or is None if all choices are active.
    """

    tokens_A: Tensor  # int32
    experts_A: Tensor  # int32
    places_A: Tensor | None


class SonicMoE(PeerExperts):
    """SonicMoE's experts. Its parameters are [E, 2I, D], with alternating rows of gate and up, and [E, D, I]."""

    def __init__(self, config: MoEConfig) -> None:
        try:
            from sonicmoe import moe_general_routing_inputs
            from sonicmoe.enums import ActivationType
        except (ImportError, OSError) as error:
            raise Unsupported(catalog.missing("sonicmoe", error)) from error
        peer, layout = _parameters(config)
        super().__init__(config, peer, layout)
        self._compute = moe_general_routing_inputs
        self._activation = getattr(ActivationType, ACTIVATIONS[config.expert_activation])
        self._pairs = Translated(_active_pairs)

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return what `experts.GroupedExperts.forward` returns."""
        pairs = self._pairs(token_mask, indices)
        if pairs.tokens_A.numel() == 0:  # SonicMoE's kernels need at least one row
            return no_rows(x, (weights, *self.parameters()))
        weights_A = weights.reshape(-1)
        output: Tensor = self._compute(
            x,
            weights_A if pairs.places_A is None else weights_A[pairs.places_A],
            pairs.tokens_A,
            pairs.experts_A,
            self.peer.w1.permute(1, 2, 0),  # type: ignore[operator]
            self.peer.b1,
            self.peer.w2.permute(1, 2, 0),  # type: ignore[operator]
            self.peer.b2,
            E=self.n_routed_experts,
            stream_id=None,  # SonicMoE takes the current stream
            activation_type=self._activation,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
        )[0]
        return output

    @staticmethod
    def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
        """Return why SonicMoE cannot run the config, or None where it can.

        SonicMoE needs SM90 or later. It takes bfloat16 and float16, and the activations `geglu` and `swiglu` without a
        limit. The size of a row must be a multiple of 16 bytes.
        """
        if device.type != "cuda":
            return Unsupported(f"SonicMoE needs a CUDA GPU, the device is {device.type}")
        reason = not_installed("sonicmoe")
        if reason is not None:
            return reason
        present = torch.cuda.get_device_capability(device)
        if present < (9, 0):
            return Unsupported(f"SonicMoE needs SM90, this is SM{present[0]}{present[1]}")
        return None if config is None else _unsupported_config(config)


def _unsupported_config(config: MoEConfig) -> Unsupported | None:
    if config.dtype not in (torch.bfloat16, torch.float16):
        return Unsupported(f"SonicMoE takes bfloat16 and float16, not {dtype_name(config.dtype)}")
    if config.expert_activation not in ACTIVATIONS or config.swiglu_limit > 0:
        limited = f" with swiglu_limit = {config.swiglu_limit}" if config.swiglu_limit > 0 else ""
        return Unsupported(f"SonicMoE does not compute {config.expert_activation}{limited}; use torch_mm")
    for name in ("dim", "moe_inter_dim"):
        size = getattr(config, name)
        if size * config.dtype.itemsize % ROW_ALIGNMENT_BYTES:
            multiple = ROW_ALIGNMENT_BYTES // config.dtype.itemsize
            return Unsupported(f"SonicMoE takes multiples of {multiple}, but {name} = {size}; use the loop")
    return None


def _parameters(config: MoEConfig) -> tuple[nn.Module, dict[str, Kept]]:
    """Return a module with SonicMoE's parameters, and the layout that maps the stacked names to these parameters."""
    experts, dim, inter = config.n_routed_experts, config.dim, config.moe_inter_dim
    shapes: dict[str, tuple[int, ...]] = {"w1": (experts, 2 * inter, dim), "w2": (experts, dim, inter)}
    layout = {
        "gate_and_up_projs": Kept("w1", lambda w: in_turns(w.mT), lambda w: in_halves(w).mT),
        "down_projs": Kept("w2", transposed, transposed),
    }
    if config.expert_bias:
        shapes |= {"b1": (experts, 2 * inter), "b2": (experts, dim)}
        layout |= {"gate_up_proj_bias": Kept("b1", in_turns, in_halves), "down_proj_bias": Kept("b2")}
    peer = nn.Module()
    for name in ("w1", "b1", "w2", "b2"):
        empty = torch.empty(shapes[name], dtype=config.dtype) if name in shapes else None
        peer.register_parameter(name, None if empty is None else nn.Parameter(empty))
    return peer, layout


def in_turns(halves: Tensor) -> Tensor:
    """Return [E, 2I, …] with gate and up in turns, from a tensor with all gates before all ups."""
    turns: Tensor = halves.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return turns


def in_halves(turns: Tensor) -> Tensor:
    """Return [E, 2I, …] with all gates before all ups, from a tensor with gate and up in turns."""
    halves: Tensor = turns.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return halves


def _active_pairs(token_mask: Tensor, indices: Tensor) -> Pairs:
    active_TK = (indices >= 0) & token_mask.unsqueeze(-1)
    tokens_A, choices_A = active_TK.nonzero(as_tuple=True)
    places_A = tokens_A * indices.shape[1] + choices_A
    everyone = places_A.numel() == indices.numel()
    return Pairs(tokens_A.int(), indices[tokens_A, choices_A].int(), None if everyone else places_A)
