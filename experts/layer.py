"""What every expert layer has in common: the forward, its checks, expert parallelism."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from experts.config import DTYPES, MoEConfig
from experts.dispatch import Dispatcher, Local
from experts.dispatchers import dispatcher_unsupported, make_dispatcher
from experts.errors import ConfigError, InputError, Unsupported

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class ExpertLayer(nn.Module, ABC):
    """An expert layer: a dispatcher around `compute_local`. One process until `init_token_dispatcher`."""

    def __init__(self, config: MoEConfig, engine_name: str, dispatcher_name: str) -> None:
        super().__init__()
        self.config = config
        self.n_routed_experts = config.n_routed_experts
        self.engine_name = engine_name
        self.dispatcher_name = dispatcher_name
        self.dispatcher: Dispatcher = Local()
        self.ep_mesh: DeviceMesh | None = None
        self.moe_mesh: DeviceMesh | None = None

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Sum over each token's chosen experts.

        x: [T, D], float32, bfloat16, float16 or float64; projections run in its dtype, whatever the parameters'.
        token_mask: [T] bool; a token it drops contributes nothing, whatever its row holds, and gets zero gradients.
        weights: [T, K] any float; the routing weights. indices: [T, K] any integer; an index of −1 contributes nothing.
        Under expert parallelism these are this rank's tokens, T of its own, and the indices those of all experts.

        Returns [T, D] in x's dtype. Raises InputError for tensors that do not fit, Unsupported for what the engine or
        the dispatcher cannot do.
        """
        self._check_inputs(x, token_mask, weights, indices)
        # int64 first: in uint8, −1 is expert 255
        indices = indices.long().masked_fill(~token_mask.unsqueeze(-1), -1)
        if x.device.type == "cpu":  # on a GPU this would wait for the device; such an index contributes nothing there
            self._check_indices(indices)
        sent = self.dispatcher.dispatch(x, weights, indices)
        y = self.compute_local(sent.x_RD, sent.weights_RK, sent.indices_RK)
        return self.dispatcher.combine(y, sent)

    @abstractmethod
    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        """Sum [R, D] over each row's choices of this rank's experts; indices are those of all experts."""

    @abstractmethod
    def _unsupported(self, device: torch.device, config: MoEConfig) -> Unsupported | None:
        """Why the layer cannot run on a device with activations of the config's dtype."""

    @abstractmethod
    def stacked_grads(self) -> dict[str, Tensor]:
        """Gradients of this rank's experts by parameter name, in the stacked layout; a missing one is absent."""

    @property
    def first_local_expert(self) -> int:
        """Index of this rank's first expert."""
        return 0 if self.ep_mesh is None else self.ep_mesh.get_local_rank() * self.n_local_experts

    @property
    def n_local_experts(self) -> int:
        """How many experts this rank holds."""
        return self.n_routed_experts if self.ep_mesh is None else self.n_routed_experts // self.ep_mesh.size()

    def init_token_dispatcher(self, ep_mesh: DeviceMesh, moe_mesh: DeviceMesh | None = None) -> None:
        """Spread the experts over a one-dimensional mesh: rank r keeps experts r·L … r·L + L − 1, L = E / ranks.

        `moe_mesh` is the mesh that expert parallelism is a dimension of, where there is one. All ranks of the mesh call
        this. Raises ConfigError where the experts do not divide by the ranks, and what the dispatcher raises; the layer
        is as it was then.
        """
        if ep_mesh.ndim != 1:
            raise ConfigError(f"ep_mesh has {ep_mesh.ndim} dimensions, needs 1; pass the expert-parallel dimension's")
        if self.n_routed_experts % ep_mesh.size():
            raise ConfigError(
                f"n_routed_experts = {self.n_routed_experts} does not divide by the EP size {ep_mesh.size()}; every "
                "rank holds as many experts: choose a divisor"
            )
        dispatcher: Dispatcher = Local()
        if ep_mesh.size() > 1:  # what may fail comes first: a layer that is half spread would be wrong in silence
            dispatcher = make_dispatcher(self.dispatcher_name, ep_mesh.get_group(), self.config)
        self.ep_mesh = ep_mesh
        self.set_moe_mesh(moe_mesh)
        self._shard_parameters(ep_mesh)
        self.dispatcher = dispatcher

    def set_moe_mesh(self, mesh: DeviceMesh | None) -> None:
        """Remember the mesh that expert parallelism is a dimension of."""
        self.moe_mesh = mesh

    @abstractmethod
    def _shard_parameters(self, ep_mesh: DeviceMesh) -> None:
        """Keep this rank's experts alone."""

    def extra_repr(self) -> str:
        """Shape and engine."""
        config = self.config
        return (
            f"{config.n_routed_experts} experts, {config.n_activated_experts} a token, dim={config.dim}, "
            f"moe_inter_dim={config.moe_inter_dim}, {config.expert_activation}, engine={self.engine_name}"
        )

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
        if indices.dtype not in INDEX_DTYPES or not weights.is_floating_point():
            raise InputError(
                f"indices ({indices.dtype}) must be integers, of up to 64 bits with a sign or 8 without, and weights "
                f"({weights.dtype}) floats; cast them"
            )
        if x.dtype not in DTYPES.values():
            raise InputError(f"x is {x.dtype}, needs one of {', '.join(DTYPES)}")
        self._check_devices(x, token_mask, weights, indices)
        self._check_supported(x)

    def _check_devices(self, *inputs: Tensor) -> None:
        """All on one; what is on meta may be computed with in silence."""
        devices = [tensor.device for tensor in (*inputs, next(self.parameters(), inputs[0]))]
        if devices.count(devices[0]) < len(devices):
            names = "x", "token_mask", "weights", "indices", "the parameters"
            where = ", ".join(f"{name} on {device}" for name, device in zip(names, devices, strict=True))
            raise InputError(f"{where}: needs one device; move them, parameters on meta by init_weights")

    def _check_supported(self, x: Tensor) -> None:
        config = self.config.with_dtype(x.dtype)
        reason = self._unsupported(x.device, config)
        if reason is not None:
            raise Unsupported(f"{self.engine_name}: {reason.reason}")
        if not isinstance(self.dispatcher, Local):
            reason = dispatcher_unsupported(self.dispatcher_name, x.device, config)
            if reason is not None:
                raise Unsupported(f"{self.dispatcher_name}: {reason.reason}")

    def _check_indices(self, indices: Tensor) -> None:
        if indices.numel() and not (int(indices.min()) >= -1 and int(indices.max()) < self.n_routed_experts):
            raise InputError(
                f"indices run from {int(indices.min())} to {int(indices.max())}, need -1 (no expert) to "
                f"{self.n_routed_experts - 1} (n_routed_experts - 1)"
            )
