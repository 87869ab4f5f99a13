"""NeMo AutoModel's GroupedExperts, computing with torch_mm: the interface and the layout that ours have too.

Its other layers, on Transformer Engine and on DeepEP, ask for a dispatcher over two ranks or more. Its "gmm" is another
name of torch_mm.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from experts.catalog import LIBRARIES
from experts.compute import torch_mm
from experts.config import MoEConfig
from experts.errors import Unsupported
from experts.modules import parameter_shapes
from experts.peers.layer import Kept, PeerExperts, not_installed

REMEDY = LIBRARIES["nemo_automodel"]
#: Compiled as whole graphs or not at all; of the others, swiglu and geglu, dynamo leaves out what it cannot.
WHOLE_GRAPHS = ("swigluoai", "quick_geglu", "relu2")


class AutoModelTorchMm(PeerExperts):
    """Its module as it is."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config, _make(config), {name: Kept(name) for name in parameter_shapes(config)})

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Sum over each token's chosen experts, as `experts.GroupedExperts`."""
        output: Tensor = self.peer(x, token_mask, weights, indices)
        return output

    @staticmethod
    def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
        """It computes by torch's grouped_mm, with its limits. Weighing a CPU's memory has another."""
        reason = not_installed("nemo_automodel", REMEDY)
        if reason is not None or config is None:
            return reason
        whole_graph = config.expert_activation in WHOLE_GRAPHS or config.swiglu_limit > 0
        if device.type == "cpu" and whole_graph:
            what = config.expert_activation + (
                f" with swiglu_limit = {config.swiglu_limit}" * (config.swiglu_limit > 0)
            )
            return Unsupported(f"its {what} is compiled as a whole graph, which a CPU's memory cannot be weighed in")
        return torch_mm.unsupported(device, config)


def _make(config: MoEConfig) -> nn.Module:
    try:
        from nemo_automodel.components.moe.config import MoEConfig as TheirConfig
        from nemo_automodel.components.moe.experts import GroupedExperts
    except ImportError as error:
        raise Unsupported(f"nemo_automodel does not import ({error}); {REMEDY}") from error
    # Dynamo compiles each of its activations anew for other shapes, modes and dtypes up to eight times a process and
    # runs it uncompiled from then on: a long sweep would slow it. In training its process has one layer's.
    torch.compiler.reset()
    fields = ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim", "expert_bias", "expert_activation")
    more = ("activation_alpha", "activation_limit", "swiglu_limit", "apply_router_weight_after_down", "dtype")
    theirs = TheirConfig(
        **{name: getattr(config, name) for name in (*fields, *more)},
        # of the router and the shared experts, which are not here
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
    # what it reads of its BackendConfig, whose import asks for transformers
    backend = SimpleNamespace(experts="torch_mm", compile_router_weight=False)
    made: nn.Module = GroupedExperts(theirs, backend)
    return made
