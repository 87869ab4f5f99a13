"""Put a router, shared experts and routed experts together: the MoE block that stands in a model's decoder layer."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from experts.activations import get_expert_activation_for_deepep
from experts.config import MoEConfig, is_gated_activation
from experts.errors import ConfigError, InputError
from experts.router import Router, RouterConfig


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What a block has besides its routed experts.

    router: how experts are chosen.
    n_shared_experts: experts of width `moe_inter_dim` that every token passes. They are computed as one expert of the
    width n_shared_experts·moe_inter_dim. 0 for none.
    shared_expert_gate: whether the shared experts' output is multiplied by the sigmoid of a linear layer [1, D].
    """

    router: RouterConfig = field(default_factory=RouterConfig)
    n_shared_experts: int = 0
    shared_expert_gate: bool = False


class SharedExperts(nn.Module):
    """The experts that every token passes, computed as one expert with the routed experts' activation and no bias.

    The parameters have the config's dtype: `gate_and_up_proj` [D, 2S] ([D, S] ungated), `down_proj` [S, D] and, with a
    gate, `gate` [D, 1]. S is n_shared_experts·moe_inter_dim.
    """

    gate: nn.Parameter | None

    def __init__(self, config: MoEConfig, n_shared_experts: int, gate: bool = False) -> None:
        super().__init__()
        width = n_shared_experts * config.moe_inter_dim
        up = width * (2 if is_gated_activation(config.expert_activation) else 1)
        self.activation = get_expert_activation_for_deepep(config)
        self.gate_and_up_proj = nn.Parameter(torch.empty(config.dim, up, dtype=config.dtype))
        self.down_proj = nn.Parameter(torch.empty(width, config.dim, dtype=config.dtype))
        self.register_parameter("gate", nn.Parameter(torch.empty(config.dim, 1, dtype=config.dtype)) if gate else None)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the shared experts' output [T, D] in x's dtype. Projections run in x's dtype."""
        h_TH = x_TD @ self.gate_and_up_proj.to(x_TD.dtype)
        y_TD = self.activation(h_TH, h_TH.new_ones(len(h_TH))) @ self.down_proj.to(x_TD.dtype)
        return y_TD if self.gate is None else y_TD * (x_TD @ self.gate.to(x_TD.dtype)).sigmoid()

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device, init_std: float = 0.02) -> None:
        """Draw the parameters from a normal distribution with standard deviation `init_std`.

        Parameters on the meta device are first allocated on `buffer_device`.
        """
        if self.down_proj.is_meta:
            self.to_empty(device=buffer_device)
        for parameter in self.parameters():
            parameter.normal_(std=init_std)


class MoEBlock(nn.Module):
    """A block: x -> the routed experts' output + the shared experts' output.

    `experts` is the layer of the routed experts, of any backend: a class of this package, or what `Backend.build`
    returns. `config` is its configuration. Expert parallelism goes through `init_token_dispatcher`; router and shared
    experts are whole on every rank.

    Raises ConfigError for a router that does not fit the experts, and for a gate without shared experts.
    """

    def __init__(self, config: MoEConfig, block: BlockConfig, experts: nn.Module) -> None:
        super().__init__()
        if block.n_shared_experts < 0 or (block.shared_expert_gate and not block.n_shared_experts):
            raise ConfigError(
                f"n_shared_experts = {block.n_shared_experts}, shared_expert_gate = {block.shared_expert_gate}: give a "
                "number of shared experts from 0, and a gate only with shared experts"
            )
        self.config = config
        self.router = Router(config, block.router)
        shared = block.n_shared_experts
        self.shared_experts = SharedExperts(config, shared, block.shared_expert_gate) if shared else None
        self.experts = experts

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Return the block's output, in x's shape and dtype.

        x: [..., D]; token_mask: [...] bool or None. A masked token has the output zero and the gradient zero, even if
        its row of x holds NaN. Raises InputError for shapes that do not fit.
        """
        rows = x.shape[:-1]
        if x.shape[-1] != self.config.dim or (token_mask is not None and token_mask.shape != rows):
            mask = "no token_mask" if token_mask is None else f"token_mask {list(token_mask.shape)}"
            raise InputError(
                f"x {list(x.shape)} with {mask}: x must be [..., dim = {self.config.dim}], and token_mask must have "
                "x's leading dimensions; reshape them"
            )
        x_TD = x.reshape(-1, self.config.dim)
        if token_mask is None:
            mask_T = torch.ones(len(x_TD), dtype=torch.bool, device=x.device)
        else:
            mask_T = token_mask.reshape(-1)
            x_TD = x_TD.masked_fill(~mask_T.unsqueeze(-1), 0.0)
        weights_TK, indices_TK = self.router(x_TD)
        y_TD: Tensor = self.experts(x_TD, mask_T, weights_TK, indices_TK)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view(x.shape)

    def init_token_dispatcher(self, ep_mesh: DeviceMesh, moe_mesh: DeviceMesh | None = None) -> None:
        """Spread the routed experts over a mesh; see `ExpertLayer.init_token_dispatcher`."""
        experts: Any = self.experts
        experts.init_token_dispatcher(ep_mesh, moe_mesh)

    def init_weights(self, buffer_device: torch.device, init_std: float = 0.02) -> None:
        """Initialise all three parts; see `GroupedExperts.init_weights`."""
        parts: list[Any] = [part for part in (self.experts, self.router, self.shared_experts) if part is not None]
        for part in parts:
            part.init_weights(buffer_device, init_std)
