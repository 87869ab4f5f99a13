"""The peer of NeMo AutoModel: its GroupedExperts with torch_mm, which has this package's interface and layout.

AutoModel's other layers, on Transformer Engine and on DeepEP, need a dispatcher over at least two ranks. Its "gmm" is
another name of its torch_mm.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from experts import catalog
from experts.compute import torch_mm
from experts.config import MoEConfig
from experts.errors import Unsupported
from experts.modules import parameter_shapes
from experts.peers.layer import Kept, PeerExperts, not_installed

#: Activations that AutoModel compiles as whole graphs. In swiglu and geglu, dynamo may leave parts uncompiled.
WHOLE_GRAPHS = ("swigluoai", "quick_geglu", "relu2")


class AutoModelTorchMm(PeerExperts):
    """AutoModel's module, unchanged."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config, _make(config), {name: Kept(name) for name in parameter_shapes(config)})

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return what `experts.GroupedExperts.forward` returns."""
        output: Tensor = self.peer(x, token_mask, weights, indices)
        return output

    @staticmethod
    def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
        """Return why AutoModel's layer cannot run: it has the limits of torch's grouped_mm, and one more on a CPU.

        moebench cannot measure the memory of a whole compiled graph on a CPU.
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


def _make(config: MoEConfig) -> nn.Module:
    try:
        from nemo_automodel.components.moe.config import MoEConfig as TheirConfig
        from nemo_automodel.components.moe.experts import GroupedExperts
    except ImportError as error:
        raise Unsupported(catalog.missing("nemo_automodel", error)) from error
    # Dynamo compiles each activation again for other shapes, modes and dtypes, up to eight times per process. After
    # that it runs the activation uncompiled, so a long sweep would slow the peer. A training process has one shape.
    torch.compiler.reset()
    fields = ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim", "expert_bias", "expert_activation")
    more = ("activation_alpha", "activation_limit", "swiglu_limit", "apply_router_weight_after_down", "dtype")
    theirs = TheirConfig(
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
    # the fields of its BackendConfig that it reads; importing that class needs transformers
    backend = SimpleNamespace(experts="torch_mm", compile_router_weight=False)
    made: nn.Module = GroupedExperts(theirs, backend)
    return made
