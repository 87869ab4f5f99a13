"""The experts of Hugging Face transformers by its default implementation, `grouped_mm`, with no model around them.

They multiply by the routing weight after the down projection, bias included. That is the same function as weighting
the activation and the bias, w·(a W + b) = (w·a) W + w·b: both values of `apply_router_weight_after_down` are this
computation, and parity says whether its rounding is within budget.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from experts.catalog import LIBRARIES
from experts.compute import torch_mm
from experts.config import MoEConfig
from experts.errors import Unsupported
from experts.peers.layer import Kept, PeerExperts, Translated, not_installed, transposed

REMEDY = LIBRARIES["transformers"]


@dataclass(frozen=True)
class Source:
    """A model's experts: where they are, what their configuration is called, and how they keep their parameters."""

    model: str
    name: str
    fields: dict[str, str]  # their name of n_routed_experts, moe_inter_dim and, where they read one, the activation
    layout: dict[str, Kept]
    activation: str | None = None
    has_bias: bool = False


_QWEN3 = {"n_routed_experts": "num_experts", "moe_inter_dim": "moe_intermediate_size", "activation": "hidden_act"}
_GPT_OSS = {"n_routed_experts": "num_local_experts", "moe_inter_dim": "intermediate_size"}
_NEMOTRON_H = {
    "n_routed_experts": "n_routed_experts",
    "moe_inter_dim": "moe_intermediate_size",
    "activation": "mlp_hidden_act",
}
_GATED = {
    "gate_and_up_projs": Kept("gate_up_proj", transposed, transposed),
    "down_projs": Kept("down_proj", transposed, transposed),
}
_UNGATED = {
    "gate_and_up_projs": Kept("up_proj", transposed, transposed),
    "down_projs": Kept("down_proj", transposed, transposed),
}
_BIASED = {
    "gate_and_up_projs": Kept("gate_up_proj"),
    "down_projs": Kept("down_proj"),
    "gate_up_proj_bias": Kept("gate_up_proj_bias"),
    "down_proj_bias": Kept("down_proj_bias"),
}

#: The experts that compute each activation, of the model that is known for it. Qwen3's name theirs in its config.
SOURCES = {
    "swiglu": Source("qwen3_moe", "Qwen3Moe", _QWEN3, _GATED, activation="silu"),
    "geglu": Source("qwen3_moe", "Qwen3Moe", _QWEN3, _GATED, activation="gelu_pytorch_tanh"),
    "quick_geglu": Source("gpt_oss", "GptOss", _GPT_OSS, _BIASED, has_bias=True),
    "relu2": Source("nemotron_h", "NemotronH", _NEMOTRON_H, _UNGATED, activation="relu2"),
}


class TransformersExperts(PeerExperts):
    """As a model of transformers would run them: routing weights in x's dtype, no expert's index is E."""

    def __init__(self, config: MoEConfig) -> None:
        source = SOURCES[config.expert_activation]
        super().__init__(config, _make(source, config), source.layout)
        self._indices = Translated(self._with_sentinels)

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Sum over each token's chosen experts, as `experts.GroupedExperts`."""
        output: Tensor = self.peer(x, self._indices(token_mask, indices), weights.to(x.dtype))
        return output

    def _with_sentinels(self, token_mask: Tensor, indices: Tensor) -> Tensor:
        """An index of E is sorted behind all experts, and its rows are not computed; −1 would come first."""
        return indices.masked_fill((indices < 0) | ~token_mask.unsqueeze(-1), self.n_routed_experts)

    @staticmethod
    def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
        """It computes by torch's grouped_mm, with its limits, and its models have these activations and biases."""
        reason = not_installed("transformers", REMEDY)
        if reason is not None or config is None:
            return reason
        source = SOURCES.get(config.expert_activation)
        if source is None or config.swiglu_limit > 0:
            limited = f" with swiglu_limit = {config.swiglu_limit}" if source is not None else ""
            return Unsupported(f"peer_transformers has no {config.expert_activation}{limited}; use torch_mm for it")
        if source.has_bias != config.expert_bias:
            has = "a bias, always" if source.has_bias else "no bias"
            return Unsupported(f"{source.name}Experts, its {config.expert_activation}, have {has}; use torch_mm")
        return torch_mm.unsupported(device, config)


def _make(source: Source, config: MoEConfig) -> nn.Module:
    """The model's experts, their parameters on the default device in the config's dtype."""
    folder = f"transformers.models.{source.model}"
    try:
        configuration: Any = getattr(import_module(f"{folder}.configuration_{source.model}"), f"{source.name}Config")
        experts: Any = getattr(import_module(f"{folder}.modeling_{source.model}"), f"{source.name}Experts")
    except (ImportError, AttributeError) as error:
        raise Unsupported(f"transformers has no {source.name}Experts to import ({error}); {REMEDY}") from error
    values = {
        "n_routed_experts": config.n_routed_experts,
        "moe_inter_dim": config.moe_inter_dim,
        "activation": source.activation,
    }
    fields = {theirs: values[ours] for ours, theirs in source.fields.items()}
    made: nn.Module = experts(configuration(hidden_size=config.dim, experts_implementation="grouped_mm", **fields))
    if source.has_bias:  # GPT-OSS keeps its two constants as attributes
        made.alpha, made.limit = config.activation_alpha, config.activation_limit  # type: ignore[assignment]
    return made.to(config.dtype)
