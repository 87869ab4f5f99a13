"""Define the base class of the expert layers, with forward, the checks of the inputs, and expert parallelism."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from experts.autocast import autocast_off
from experts.config import DTYPES, BackendConfig, MoEConfig
from experts.dispatch import Dispatcher, Local
from experts.dispatchers import dispatcher_options, dispatcher_unsupported, make_dispatcher
from experts.errors import ConfigError, InputError, Unsupported
from experts.steps import eager, steps_on

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_mesh(ep_mesh: DeviceMesh, n_routed_experts: int) -> None:
    """Raise ConfigError unless the mesh has one dimension, and its size divides the number of experts."""
    if ep_mesh.ndim != 1:
        raise ConfigError(f"ep_mesh has {ep_mesh.ndim} dimensions, but must have 1; pass the expert-parallel one")
    if n_routed_experts % ep_mesh.size():
        raise ConfigError(
            f"n_routed_experts = {n_routed_experts} is not a multiple of the EP size {ep_mesh.size()}; every "
            "rank holds the same number of experts, so choose an EP size that divides it"
        )


def check_indices(indices_TK: Tensor, n_routed_experts: int) -> None:
    """Raise InputError unless int64 indices on a CPU are from −1 (no expert) to `n_routed_experts` − 1.

    On a GPU the check would wait for the device. A wrong index adds nothing there.
    """
    if indices_TK.device.type != "cpu" or not indices_TK.numel():
        return
    least, most = int(indices_TK.min()), int(indices_TK.max())
    if least < -1 or most >= n_routed_experts:
        raise InputError(
            f"indices run from {least} to {most}, but must be from -1 (no expert) to {n_routed_experts - 1} "
            "(n_routed_experts - 1); correct the routing"
        )


def join_backward(tensor: Tensor) -> Tensor:
    """Return x or the routing weights so that this rank takes part in the dispatcher's backward.

    A backward of another rank waits for all ranks. This rank does not know whether another rank's tensors require
    gradients. So in grad mode both tensors require gradients inside of the layer, also if the caller does not want
    them, and even if all parameters are frozen.
    """
    if tensor.requires_grad or not torch.is_grad_enabled():
        return tensor
    own = tensor.clone() if tensor.is_inference() else tensor.detach()
    return own.requires_grad_()


@functools.cache
def uncompiled_forward() -> Callable[..., Tensor]:
    """Return `ExpertLayer.forward` so that torch's compiler runs it as it is. The first call imports the compiler."""
    reason = "ranks exchange tokens, or the layer keeps weights in FP8, or it adds to main gradients"
    hidden: Callable[..., Tensor] = torch.compiler.disable(ExpertLayer.forward, reason=reason)
    return hidden


class ExpertLayer(nn.Module, ABC):
    """An expert layer: a dispatcher sends tokens to the ranks, and `compute_local` computes the experts of one rank.

    The layer runs on one process until `init_token_dispatcher` is called.
    """

    def __init__(self, config: MoEConfig, backend: BackendConfig, engine_name: str, dispatcher_name: str) -> None:
        super().__init__()
        self.config = config
        self.n_routed_experts = config.n_routed_experts
        self.expert_bias = config.expert_bias  # NeMo AutoModel's model reads it to initialise its layers
        self.engine_name = engine_name
        self.dispatcher_name = dispatcher_name
        self.dispatcher_options = dispatcher_options(dispatcher_name, backend)
        self.dispatcher: Dispatcher = Local()
        self.ep_mesh: DeviceMesh | None = None
        self.moe_mesh: DeviceMesh | None = None

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return, for each token, the weighted sum of the outputs of its chosen experts: [T, D] in x's dtype.

        x: [T, D], float32, bfloat16, float16 or float64. Projections run in x's dtype, whatever the parameters' dtype.
        The layer ignores a surrounding `torch.autocast`, in forward and in backward.
        token_mask: [T] bool. If it is False for a token, the token's output and gradient are zero, even if the token's
        row of x holds NaN.
        weights: [T, K] routing weights of any float dtype.
        indices: [T, K] expert indices: int64, int32, int16, int8 or uint8. An index of −1 contributes nothing.
        Under expert parallelism the tensors hold this rank's tokens, and T may differ between ranks. The indices count
        the experts of all ranks. In grad mode the output requires a gradient on every rank, whatever the inputs and
        parameters require, because every rank must take part in backward.

        Raises InputError for tensors that do not fit the layer. Raises Unsupported if the engine or the dispatcher
        cannot run x's dtype on x's device.
        """
        if torch.compiler.is_compiling() and not isinstance(self.dispatcher, Local):
            output: Tensor = uncompiled_forward()(self, x, token_mask, weights, indices)
            return output
        self._check_inputs(x, token_mask, weights, indices)
        if torch.compiler.is_compiling():  # the compiler makes one kernel of it; the engine checks indices when it runs
            indices = eager.mask_choices(indices, token_mask)
        else:
            indices = steps_on(x.device).mask_choices(indices, token_mask)
            check_indices(indices, self.n_routed_experts)
        if not isinstance(self.dispatcher, Local):
            x, weights = join_backward(x), join_backward(weights)
        with autocast_off(x):
            sent = self.dispatcher.dispatch(x, weights, indices)
            y = self.compute_local(sent.x_RD, sent.weights_RK, sent.indices_RK)
            return self.dispatcher.combine(y, sent)

    @abstractmethod
    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        """Return [R, D] in x's dtype: for each row, the sum over its choices of this rank's experts.

        x: [R, D]; weights: [R, K]; indices: [R, K] int64, counted over the experts of all ranks.
        """

    @abstractmethod
    def _unsupported(self, device: torch.device, config: MoEConfig) -> Unsupported | None:
        """Return why the layer cannot run on a device with activations of the config's dtype, or None where it can."""

    @abstractmethod
    def stacked_grads(self) -> dict[str, Tensor]:
        """Return the gradients of this rank's experts by parameter name, in the stacked layout.

        A parameter without a gradient has no entry.
        """

    @property
    def first_local_expert(self) -> int:
        """The index of this rank's first expert."""
        return 0 if self.ep_mesh is None else self.ep_mesh.get_local_rank() * self.n_local_experts

    @property
    def n_local_experts(self) -> int:
        """The number of experts that this rank holds."""
        return self.n_routed_experts if self.ep_mesh is None else self.n_routed_experts // self.ep_mesh.size()

    def init_token_dispatcher(self, ep_mesh: DeviceMesh, moe_mesh: DeviceMesh | None = None) -> None:
        """Spread the experts over a one-dimensional mesh: rank r keeps experts r·L … r·L + L − 1, L = E / ranks.

        All ranks of the mesh must call this method. `moe_mesh` is the larger mesh that has `ep_mesh` as one dimension,
        or None. Raises ConfigError if `ep_mesh` does not have one dimension, or if the number of experts is not a
        multiple of the number of ranks. Raises Unsupported if the dispatcher cannot run over the mesh. After an error
        the layer is unchanged.
        """
        check_mesh(ep_mesh, self.n_routed_experts)
        dispatcher: Dispatcher = Local()
        if ep_mesh.size() > 1:  # first, as it may fail: a half-spread layer would be silently wrong
            dispatcher = make_dispatcher(
                self.dispatcher_name, ep_mesh.get_group(), self.config, self.dispatcher_options
            )
        self.ep_mesh = ep_mesh
        self.set_moe_mesh(moe_mesh)
        self._shard_parameters(ep_mesh)
        self.dispatcher = dispatcher

    def set_moe_mesh(self, mesh: DeviceMesh | None) -> None:
        """Store the larger mesh that has the expert-parallel mesh as one dimension, or None."""
        self.moe_mesh = mesh

    @abstractmethod
    def _shard_parameters(self, ep_mesh: DeviceMesh) -> None:
        """Keep only this rank's experts."""

    def extra_repr(self) -> str:
        """Return the text about the layer's sizes and engine that `repr` shows."""
        config = self.config
        return (
            f"{config.n_routed_experts} experts, {config.n_activated_experts} per token, dim={config.dim}, "
            f"moe_inter_dim={config.moe_inter_dim}, {config.expert_activation}, engine={self.engine_name}"
        )

    def _check_inputs(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> None:
        config = self.config
        if x.ndim != 2 or x.shape[1] != config.dim:
            raise InputError(f"x has shape {list(x.shape)}, but needs [tokens, dim = {config.dim}]; flatten its batch")
        choices = [x.shape[0], config.n_activated_experts]
        if list(weights.shape) != choices or list(indices.shape) != choices:
            raise InputError(
                f"weights {list(weights.shape)} and indices {list(indices.shape)} must have shape [tokens, "
                f"n_activated_experts] = {choices}; pass one weight and one index per choice"
            )
        if list(token_mask.shape) != [x.shape[0]] or token_mask.dtype is not torch.bool:
            raise InputError(
                f"token_mask is {token_mask.dtype} {list(token_mask.shape)}, but must be torch.bool [tokens] = "
                f"[{x.shape[0]}]; pass one bool per token"
            )
        if indices.dtype not in INDEX_DTYPES or not weights.is_floating_point():
            raise InputError(
                f"indices ({indices.dtype}) must be int64, int32, int16, int8 or uint8, and weights ({weights.dtype}) "
                "must be floats; cast them"
            )
        if x.dtype not in DTYPES.values():
            raise InputError(f"x is {x.dtype}, but must be one of {', '.join(DTYPES)}; cast it")
        self._check_devices(x, token_mask, weights, indices)
        self._check_supported(x)

    def _check_devices(self, *inputs: Tensor) -> None:
        """Raise InputError unless all tensors are on one device: torch may compute with a meta tensor silently."""
        devices = [tensor.device for tensor in (*inputs, next(self.parameters(), inputs[0]))]
        if devices.count(devices[0]) < len(devices):
            names = "x", "token_mask", "weights", "indices", "the parameters"
            where = ", ".join(f"{name} on {device}" for name, device in zip(names, devices, strict=True))
            raise InputError(f"{where}: all must be on one device; move them, and parameters on meta with init_weights")

    def _check_supported(self, x: Tensor) -> None:
        config = self.config.with_dtype(x.dtype)
        reason = self._unsupported(x.device, config)
        if reason is not None:
            raise Unsupported(f"{self.engine_name}: {reason.reason}")
        if not isinstance(self.dispatcher, Local):
            reason = dispatcher_unsupported(self.dispatcher_name, x.device, config)
            if reason is not None:
                raise Unsupported(f"{self.dispatcher_name}: {reason.reason}")
