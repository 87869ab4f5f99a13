"""Make a peer (another library's layer) of the experts of Hugging Face transformers, without the rest of a model.

The experts run with transformers' default implementation, `grouped_mm`. transformers applies the routing weight after
the down projection and its bias. Weighting the activation and the bias is the same function:
w·(a W + b) = (w·a) W + w·b. So the peer serves both values of `apply_router_weight_after_down`. `moebench parity`
checks whether the peer's rounding is within budget.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from experts import catalog
from experts.compute import torch_mm
from experts.config import MoEConfig
from experts.errors import Unsupported
from experts.peers.layer import Kept, PeerExperts, Translated, not_installed, transposed


@dataclass(frozen=True)
class Source:
    """The experts of a model in transformers.

    `model` is the name of the model's package, and `name` is how the names of the model's classes begin. `activation`
    is the activation's name in the model's configuration, or None if the configuration does not name an activation.
    `has_bias` is true if the projections always have a bias, and false if they never have one.
    """

    model: str
    name: str
    fields: dict[str, str]  # n_routed_experts, moe_inter_dim and perhaps activation -> the configuration's field
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

#: Activation -> the experts of a model that computes the activation. Qwen3's configuration names its activation.
SOURCES = {
    "swiglu": Source("qwen3_moe", "Qwen3Moe", _QWEN3, _GATED, activation="silu"),
    "geglu": Source("qwen3_moe", "Qwen3Moe", _QWEN3, _GATED, activation="gelu_pytorch_tanh"),
    "quick_geglu": Source("gpt_oss", "GptOss", _GPT_OSS, _BIASED, has_bias=True),
    "relu2": Source("nemotron_h", "NemotronH", _NEMOTRON_H, _UNGATED, activation="relu2"),
}


class TransformersExperts(PeerExperts):
    """The experts as a model of transformers runs them, with routing weights in x's dtype and index E for no expert."""

    def __init__(self, config: MoEConfig) -> None:
        source = SOURCES[config.expert_activation]
        super().__init__(config, _make(source, config), source.layout)
        self._indices = Translated(self._with_sentinels)

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return what `experts.GroupedExperts.forward` returns."""
        output: Tensor = self.peer(x, self._indices(token_mask, indices), weights.to(x.dtype))
        return output

    def _with_sentinels(self, token_mask: Tensor, indices: Tensor) -> Tensor:
        """Return the indices, with E for choices that contribute nothing.

        transformers sorts the rows of index E behind the rows of all experts and does not compute them. It would sort
        the rows of −1 first.
        """
        return indices.masked_fill((indices < 0) | ~token_mask.unsqueeze(-1), self.n_routed_experts)

    @staticmethod
    def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
        """Return why these experts cannot run the config, or None where they can.

        They have the limits of torch's grouped_mm, and only the activations and biases of the models in `SOURCES`.
        """
        reason = not_installed("transformers")
        if reason is not None or config is None:
            return reason
        source = SOURCES.get(config.expert_activation)
        if source is None or config.swiglu_limit > 0:
            limited = f" with swiglu_limit = {config.swiglu_limit}" if source is not None else ""
            return Unsupported(f"peer_transformers does not compute {config.expert_activation}{limited}; use torch_mm")
        if source.has_bias != config.expert_bias:
            has = "always have a bias" if source.has_bias else "never have a bias"
            return Unsupported(f"{source.name}Experts, which compute {config.expert_activation}, {has}; use torch_mm")
        return torch_mm.unsupported(device, config)


def _make(source: Source, config: MoEConfig) -> nn.Module:
    """Return the model's experts, with parameters on the default device in the config's dtype."""
    folder = f"transformers.models.{source.model}"
    try:
        configuration: Any = getattr(import_module(f"{folder}.configuration_{source.model}"), f"{source.name}Config")
        experts: Any = getattr(import_module(f"{folder}.modeling_{source.model}"), f"{source.name}Experts")
    except (ImportError, AttributeError) as error:
        raise Unsupported(catalog.missing("transformers", error)) from error
    values = {
        "n_routed_experts": config.n_routed_experts,
        "moe_inter_dim": config.moe_inter_dim,
        "activation": source.activation,
    }
    fields = {theirs: values[ours] for ours, theirs in source.fields.items()}
    made: nn.Module = experts(configuration(hidden_size=config.dim, experts_implementation="grouped_mm", **fields))
    if source.has_bias:  # GPT-OSS keeps alpha and limit as attributes
        made.alpha, made.limit = config.activation_alpha, config.activation_limit  # type: ignore[assignment]
    return made.to(config.dtype)
