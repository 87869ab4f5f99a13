"""Make peers (other libraries' layers) of the expert layers of NeMo AutoModel.

AutoModel has three layers with this package's interface and state dict. `GroupedExperts` runs on one process, or
gathers the tokens of all ranks. `GroupedExpertsDeepEP` and `GroupedExpertsTE` send tokens with DeepEP, and run on two
or more ranks only. AutoModel's own code moves the tokens. In AutoModel, "gmm" is another name of the engine "torch_mm",
and "torch" is the name of the dispatcher that gathers.
"""

import atexit
import importlib
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from experts import catalog
from experts.compute import torch_mm
from experts.config import MoEConfig
from experts.dispatch import deepep
from experts.errors import Unsupported
from experts.layer import check_mesh
from experts.modules import parameter_shapes
from experts.peers.layer import Kept, PeerExperts, Translated, not_installed
from experts.state_dict import local_share, sharded
from experts.te import library

#: Activations that AutoModel compiles as whole graphs. In swiglu and geglu, dynamo may leave parts uncompiled.
WHOLE_GRAPHS = ("swigluoai", "quick_geglu", "relu2")

_LAYERS = "nemo_automodel.components.moe.experts"
_CONFIG = "nemo_automodel.components.moe.config"
_BUFFER = "nemo_automodel.components.moe.megatron.fused_a2a"


class AutoModelTorchMm(PeerExperts):
    """AutoModel's `GroupedExperts`, or `GroupedExpertsDeepEP` for the dispatcher "deepep", unchanged."""

    dispatchers = ("local", "allgather", "deepep")

    def __init__(self, config: MoEConfig, dispatcher: str | None = None) -> None:
        layer = "GroupedExpertsDeepEP" if dispatcher == "deepep" else "GroupedExperts"
        super().__init__(config, _make(layer, "torch_mm", config), _same_names(config))
        self._by_deepep = dispatcher == "deepep"
        self._indices = Translated(_int64)

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return what `experts.GroupedExperts.forward` returns."""
        output: Tensor = self.peer(x, token_mask, weights.contiguous(), self._indices(token_mask, indices))
        return output

    def init_token_dispatcher(self, ep_mesh: DeviceMesh, moe_mesh: DeviceMesh | None = None) -> None:
        """Spread the experts over a one-dimensional mesh; see `experts.GroupedExperts.init_token_dispatcher`."""
        check_mesh(ep_mesh, self.n_routed_experts)
        if self._by_deepep:
            _check_deepep(ep_mesh, self.config)
        for name, parameter in list(self.peer.named_parameters()):
            share = sharded(local_share(parameter.detach(), ep_mesh).clone(), ep_mesh)
            setattr(self.peer, name, nn.Parameter(share))
        if self._by_deepep:
            _init_deepep(self.peer, ep_mesh)

    @staticmethod
    def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
        """Return why AutoModel's layer cannot run the config, or None where it can.

        The layer has the limits of torch's grouped_mm. On a CPU, it also must not compile the activation as a whole
        graph, because moebench cannot measure the memory of a whole compiled graph there.
        """
        reason = not_installed("nemo_automodel")
        if reason is not None or config is None:
            return reason
        whole_graph = config.expert_activation in WHOLE_GRAPHS or config.swiglu_limit > 0
        if device.type == "cpu" and whole_graph:
            limited = f" with swiglu_limit = {config.swiglu_limit}" * (config.swiglu_limit > 0)
            return Unsupported(
                f"NeMo AutoModel compiles {config.expert_activation}{limited} as a whole graph, and memory on a CPU "
                "cannot be measured there; use a GPU"
            )
        return torch_mm.unsupported(device, config)


class AutoModelTE(PeerExperts):
    """AutoModel's `GroupedExpertsTE`, unchanged. It has no parameters before `init_token_dispatcher`.

    Transformer Engine keeps the weights of each expert as a parameter [out, in]. AutoModel's state dict is stacked.
    """

    dispatchers = ("deepep",)

    def __init__(self, config: MoEConfig, dispatcher: str | None = None) -> None:
        _theirs(_LAYERS)
        super().__init__(config, nn.Module(), _same_names(config))
        self._indices = Translated(_int64)
        self.register_load_state_dict_post_hook(_expect_stacked)

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return what `experts.GroupedExperts.forward` returns."""
        output: Tensor = self.peer(x, token_mask, weights.contiguous(), self._indices(token_mask, indices))
        return output

    def init_token_dispatcher(self, ep_mesh: DeviceMesh, moe_mesh: DeviceMesh | None = None) -> None:
        """Make this rank's experts, on the device of a one-dimensional mesh, with AutoModel's initial weights."""
        check_mesh(ep_mesh, self.n_routed_experts)
        _check_deepep(ep_mesh, self.config)
        made = _make("GroupedExpertsTE", "te", self.config)  # on the meta device
        _init_deepep(made, ep_mesh)
        made.init_weights(torch.device(ep_mesh.device_type))  # type: ignore[operator]
        self.peer = made

    def stacked_grads(self) -> dict[str, Tensor]:
        """Return the gradients of this rank's experts, stacked.

        A parameter has no entry if any expert has no gradient.
        """
        found = {}
        for name in self.layout:
            linear: Any = self.peer.gate_up_linear if name.startswith("gate") else self.peer.down_linear
            kind = "bias" if name.endswith("bias") else "weight"
            grads = [getattr(linear, f"{kind}{index}").grad for index in range(linear.num_gemms)]
            if all(grad is not None for grad in grads):
                stacked = torch.stack(grads)
                found[name] = stacked if kind == "bias" else stacked.mT
        return found

    @staticmethod
    def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
        """Return why AutoModel's layer cannot run the config, or None where it can.

        The layer has the limits of Transformer Engine.
        """
        reason = not_installed("nemo_automodel") or library.unsupported(device, config, None)
        if reason is None and config is not None and config.apply_router_weight_after_down:
            return Unsupported(
                "NeMo AutoModel's layer on Transformer Engine applies the routing weight before the down projection; "
                "use peer_automodel_torch_mm"
            )
        return reason


def destroy_buffers() -> None:
    """Free the buffer of AutoModel's DeepEP layers. All ranks must call this function.

    AutoModel makes the buffer again when a layer needs it.
    """
    module: Any = sys.modules.get(_BUFFER)
    if getattr(module, "_buffer", None) is not None:
        torch.cuda.synchronize()
        module.free_buffer()


atexit.register(destroy_buffers)


def _same_names(config: MoEConfig) -> dict[str, Kept]:
    return {name: Kept(name) for name in parameter_shapes(config)}


def _int64(_: Tensor, indices: Tensor) -> Tensor:
    """Return the indices as AutoModel's router makes them."""
    return indices.long().contiguous()


def _theirs(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise Unsupported(catalog.missing("nemo_automodel", error)) from error


def _make(layer: str, experts: str, config: MoEConfig) -> nn.Module:
    """Return the named layer of AutoModel with its engine `experts`, on the default device or on the meta device."""
    of_layer = getattr(_theirs(_LAYERS), layer)
    # Dynamo compiles each activation again for other shapes, modes and dtypes, up to eight times per process. After
    # that, dynamo runs the activation uncompiled, so the peer would become slow in a long sweep. In training this does
    # not happen, because all calls have one shape.
    torch.compiler.reset()
    fields = ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim", "expert_bias", "expert_activation")
    more = ("activation_alpha", "activation_limit", "swiglu_limit", "apply_router_weight_after_down", "dtype")
    theirs = _theirs(_CONFIG).MoEConfig(
        **{name: getattr(config, name) for name in (*fields, *more)},
        # for the router and the shared experts, which are not used here
        n_shared_experts=0,
        n_expert_groups=1,
        n_limited_groups=1,
        train_gate=False,
        gate_bias_update_factor=0.0,
        aux_loss_coeff=0.0,
        score_func="softmax",
        route_scale=1.0,
        inter_dim=config.moe_inter_dim,
        norm_topk_prob=True,
    )
    # The fields of AutoModel's BackendConfig that the layers read, with its defaults. Importing BackendConfig needs
    # transformers.
    backend = SimpleNamespace(
        experts=experts,
        compile_router_weight=False,
        te_grouped_tensor=False,
        benchmark_static_routing=False,
        dispatcher_hybridep_permute_fusion=False,
        dispatcher_hybridep_compact_routing=False,
        dispatcher_hybridep_num_sms_preprocessing=None,
        dispatcher_hybridep_num_blocks_permute=None,
        dispatcher_hybridep_num_blocks_unpermute=None,
    )
    # Layers that share a dispatcher get that of the process's first layer, which may have had other experts
    alone = {} if layer == "GroupedExperts" else {"dispatcher_share_token_dispatcher": False}
    try:
        made: nn.Module = of_layer(theirs, backend, **alone)
    except ImportError as error:  # GroupedExpertsTE imports further modules of AutoModel
        raise Unsupported(catalog.missing("nemo_automodel", error)) from error
    return made


def _check_deepep(ep_mesh: DeviceMesh, config: MoEConfig) -> None:
    """Raise Unsupported if AutoModel's DeepEP layers cannot run over the mesh.

    They sort rows by expert with functions of Transformer Engine. `deep_ep` limits the number of experts per rank.
    """
    if (missing := library.not_installed()) is not None:
        raise missing
    size, n_local_experts = ep_mesh.size(), config.n_routed_experts // ep_mesh.size()
    if size < 2:
        raise Unsupported("deep_ep needs at least 2 ranks, the group has 1; leave the dispatcher out")
    if n_local_experts > deepep.MAX_EXPERTS_A_RANK:
        raise Unsupported(
            f"deep_ep dispatches to at most {deepep.MAX_EXPERTS_A_RANK} experts per rank, but n_routed_experts = "
            f"{config.n_routed_experts} on {size} ranks is {n_local_experts}; use more ranks"
        )
    try:
        importlib.import_module("deep_ep").Buffer.get_dispatch_config(size)
    except AssertionError as error:
        raise Unsupported(f"deep_ep does not run on {size} ranks; use another number of ranks") from error
    except (ImportError, OSError) as error:
        raise Unsupported(catalog.missing("deep_ep", error)) from error


def _init_deepep(made: nn.Module, ep_mesh: DeviceMesh) -> None:
    destroy_buffers()  # else AutoModel would keep a smaller buffer without freeing it
    try:
        made.init_token_dispatcher(ep_mesh)  # type: ignore[operator]
    except ImportError as error:
        raise Unsupported(catalog.missing("nemo_automodel", error)) from error


def _expect_stacked(module: nn.Module, keys: Any) -> None:
    """Remove the parameters of single experts from the missing keys (a load hook): state dicts have stacked keys."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if "_linear." not in key]
