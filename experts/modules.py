"""Expert layers: nn.Modules that own the parameters and compose an engine with a token dispatcher."""

import torch
from torch import Tensor, nn

from experts.compute import ExpertParameters
from experts.config import BackendConfig, MoEConfig, is_gated_activation
from experts.engines import get_engine
from experts.errors import InputError, Unsupported

PARAMETER_NAMES = ExpertParameters._fields


def parameter_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each stacked parameter that the configuration has, by name."""
    up = config.moe_inter_dim * (2 if is_gated_activation(config.expert_activation) else 1)
    shapes: dict[str, tuple[int, ...]] = {
        "gate_and_up_projs": (config.n_routed_experts, config.dim, up),
        "down_projs": (config.n_routed_experts, config.moe_inter_dim, config.dim),
    }
    if config.expert_bias:
        shapes["gate_up_proj_bias"] = (config.n_routed_experts, up)
        shapes["down_proj_bias"] = (config.n_routed_experts, config.dim)
    return shapes


class GroupedExperts(nn.Module):
    """Routed experts of one layer in one process: by default the per-expert loop, or the engine `backend` names.

    Parameters, in `config.dtype`: `gate_and_up_projs` [E, D, 2I] ([E, D, I] ungated), `down_projs` [E, I, D], and with
    `expert_bias` `gate_up_proj_bias` [E, 2I] and `down_proj_bias` [E, D] (None without). They hold anything until
    `init_weights` or `load_state_dict`.

    Raises RegistryError for an engine that is not here, Unsupported for sizes that the engine cannot take.
    """

    default_engine = "loop"

    gate_and_up_projs: nn.Parameter
    down_projs: nn.Parameter
    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(self, config: MoEConfig, backend: BackendConfig | None = None) -> None:
        super().__init__()
        backend = backend or BackendConfig()
        self.config = config
        self.n_routed_experts = config.n_routed_experts
        self.engine_name = backend.experts or self.default_engine
        self.engine = get_engine(self.engine_name)
        self._check_supported(config.dtype, torch.get_default_device())
        shapes = parameter_shapes(config)
        for name in PARAMETER_NAMES:
            empty = torch.empty(shapes[name], dtype=config.dtype) if name in shapes else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Sum over each token's chosen experts.

        x: [T, D], float32, bfloat16, float16 or float64; projections run in its dtype, whatever the parameters'.
        token_mask: [T] bool; a token it drops contributes nothing, whatever its row holds, and gets zero gradients.
        weights: [T, K] any float; the routing weights. indices: [T, K] any integer; an index of −1 contributes nothing.

        Returns [T, D] in x's dtype. Raises InputError for tensors that do not fit.
        """
        self._check_inputs(x, token_mask, weights, indices)
        indices = indices.masked_fill(~token_mask.unsqueeze(-1), -1)
        return self.engine.compute(x, weights, indices, self.expert_parameters(), self.config, 0)

    def expert_parameters(self) -> ExpertParameters:
        """The local experts' parameters, stacked."""
        return ExpertParameters(self.gate_and_up_projs, self.down_projs, self.gate_up_proj_bias, self.down_proj_bias)

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device, init_std: float = 0.02) -> None:
        """Normal projections with deviation `init_std`, zero biases; meta parameters become real on `buffer_device`."""
        if any(parameter.is_meta for parameter in self.parameters()):
            self.to_empty(device=buffer_device)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=init_std)

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"{config.n_routed_experts} experts, {config.n_activated_experts} a token, dim={config.dim}, "
            f"moe_inter_dim={config.moe_inter_dim}, {config.expert_activation}, engine={self.engine_name}"
        )

    def _check_supported(self, dtype: torch.dtype, device: torch.device) -> None:
        reason = self.engine.unsupported(device, self.config.with_dtype(dtype))
        if reason is not None:
            raise Unsupported(f"{self.engine_name}: {reason.reason}")

    def _check_inputs(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> None:
        config = self.config
        if x.ndim != 2 or x.shape[1] != config.dim:
            raise InputError(f"x has shape {list(x.shape)}, needs [tokens, dim = {config.dim}]; flatten its batch")
        choices = [x.shape[0], config.n_activated_experts]
        if list(weights.shape) != choices or list(indices.shape) != choices:
            raise InputError(
                f"weights {list(weights.shape)} and indices {list(indices.shape)} need shape [tokens, "
                f"n_activated_experts] = {choices}"
            )
        if list(token_mask.shape) != [x.shape[0]] or token_mask.dtype is not torch.bool:
            raise InputError(
                f"token_mask is {token_mask.dtype} {list(token_mask.shape)}, needs bool [tokens] = [{x.shape[0]}]"
            )
        if indices.is_floating_point() or not weights.is_floating_point():
            raise InputError(f"indices ({indices.dtype}) must be integers and weights ({weights.dtype}) floats")
        if x.dtype is not config.dtype or x.device.type != "cpu":
            self._check_supported(x.dtype, x.device)
        if x.device.type == "cpu":  # on a GPU this would wait for the device; such an index contributes nothing there
            self._check_indices(indices)

    def _check_indices(self, indices: Tensor) -> None:
        if indices.numel() and not (int(indices.min()) >= -1 and int(indices.max()) < self.n_routed_experts):
            raise InputError(
                f"indices run from {int(indices.min())} to {int(indices.max())}, need -1 (no expert) to "
                f"{self.n_routed_experts - 1} (n_routed_experts - 1)"
            )
