"""Make a peer (another library's layer) of NeMo AutoModel's `GroupedExperts` with AutoModel's engine "torch_mm".

AutoModel's `GroupedExperts` has this package's interface and layout. AutoModel's layers on Transformer Engine and on
DeepEP need a dispatcher over at least two ranks, so they are not peers. In AutoModel, "gmm" is another name of
"torch_mm".
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
    """AutoModel's `GroupedExperts`, unchanged."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config, _make(config), {name: Kept(name) for name in parameter_shapes(config)})

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return what `experts.GroupedExperts.forward` returns."""
        output: Tensor = self.peer(x, token_mask, weights, indices)
        return output

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


def _make(config: MoEConfig) -> nn.Module:
    try:
        from nemo_automodel.components.moe.config import MoEConfig as TheirConfig
        from nemo_automodel.components.moe.experts import GroupedExperts
    except ImportError as error:
        raise Unsupported(catalog.missing("nemo_automodel", error)) from error
    # Dynamo compiles each activation again for other shapes, modes and dtypes, up to eight times per process. After
    # that, dynamo runs the activation uncompiled, so the peer would become slow in a long sweep. In training this does
    # not happen, because all calls have one shape.
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
    # the fields of AutoModel's BackendConfig that GroupedExperts reads; importing BackendConfig needs transformers
    backend = SimpleNamespace(experts="torch_mm", compile_router_weight=False)
    made: nn.Module = GroupedExperts(theirs, backend)
    return made
