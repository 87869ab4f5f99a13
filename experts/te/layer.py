"""GroupedExpertsTE: experts by Transformer Engine's GroupedLinear, in bfloat16, float16, float32 or FP8.

It keeps TE's own parameters, one [out, in] matrix an expert, and speaks the stacked layout to everyone else.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from experts.compute.grouped import GroupedProduct, grouped_experts, no_rows
from experts.config import BackendConfig, MoEConfig, dtype_name, is_gated_activation
from experts.errors import ConfigError, Unsupported
from experts.layer import ExpertLayer
from experts.permutation import sort_by_expert
from experts.te import layout, library
from experts.te.layout import LINEARS


class GroupedExpertsTE(ExpertLayer):
    """Routed experts by Transformer Engine and, under expert parallelism, DeepEP by default.

    `backend.te_fp8` names an FP8 recipe for the two projections; without one an ambient `te.autocast` is honoured. TE's
    own parameters are `gate_up_linear.weight{i}` [2I, D] and `down_linear.weight{i}` [D, I], and their biases; the
    stacked ones are properties made of them, and what the state dict holds.

    Raises Unsupported where Transformer Engine is not installed, ConfigError for a backend that names another engine.
    """

    gate_up_linear: Any
    down_linear: Any

    def __init__(self, config: MoEConfig, backend: BackendConfig | None = None) -> None:
        backend = backend or BackendConfig()
        if backend.experts not in (None, "te"):
            raise ConfigError(f"GroupedExpertsTE computes with te, not {backend.experts!r}; use GroupedExperts for it")
        if backend.save is not None:
            raise ConfigError(f"save = {backend.save!r} is of torch_mm, triton and gmm, te keeps its own; leave it out")
        missing = library.not_installed()
        if missing is not None:
            raise missing
        super().__init__(config, "te", backend.dispatcher or "deepep")
        self.te_fp8 = backend.te_fp8
        up = config.moe_inter_dim * (2 if is_gated_activation(config.expert_activation) else 1)
        self.gate_up_linear = self._make_linear(config.dim, up, torch.get_default_device())
        self.down_linear = self._make_linear(config.moe_inter_dim, config.dim, torch.get_default_device())
        self._is_first_microbatch: bool | None = None
        self.register_state_dict_post_hook(layout.stack_keys)
        self.register_load_state_dict_pre_hook(layout.split_keys)
        self.register_load_state_dict_post_hook(layout.name_missing_keys)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor,
        weights: Tensor,
        indices: Tensor,
        is_first_microbatch: bool | None = None,
    ) -> Tensor:
        """As `ExpertLayer.forward`. FP8 weights are quantised in every call, unless `is_first_microbatch` is given.

        True quantises and keeps them, False uses those kept, which is right while the weights do not change.
        """
        self._is_first_microbatch = is_first_microbatch
        return super().forward(x, token_mask, weights, indices)

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        """Two GroupedLinears over rows sorted by expert. The sizes of the groups live on the host: every call waits."""
        permutation = sort_by_expert(indices_RK, self.first_local_expert, self.n_local_experts)
        rows_per_expert: list[int] = permutation.tokens_per_expert_L.tolist()
        if sum(rows_per_expert) == 0:
            return no_rows(x_RD, (weights_RK, *self.parameters()))

        def by(linear: nn.Module) -> GroupedProduct:
            return lambda rows: self._multiply(linear, rows, rows_per_expert)

        biases = (layout.stacked(self, name) for name in ("gate_up_proj_bias", "down_proj_bias"))
        rows = permutation.cut(sum(rows_per_expert))
        with self._autocast():
            products = by(self.gate_up_linear), by(self.down_linear)
            return grouped_experts(x_RD, weights_RK, rows, self.config, *products, *biases)

    def _unsupported(self, device: torch.device, config: MoEConfig) -> Unsupported | None:
        """TE's reason, with the FP8 recipe of this layer."""
        kept = dtype_name(self.gate_up_linear.weight0.dtype)
        if config.dtype is torch.float32 and kept != "float32":
            return Unsupported(f"Transformer Engine computes float32 on float32 parameters, these are {kept}")
        return library.unsupported(device, config, self.te_fp8)

    @property
    def gate_and_up_projs(self) -> Tensor:
        """[E, D, 2I] ([E, D, I] ungated), stacked from TE's weights; a DTensor under expert parallelism."""
        stacked = layout.sharded(self, "gate_and_up_projs")
        assert stacked is not None
        return stacked

    @property
    def down_projs(self) -> Tensor:
        """[E, I, D], stacked from TE's weights; a DTensor under expert parallelism."""
        stacked = layout.sharded(self, "down_projs")
        assert stacked is not None
        return stacked

    @property
    def gate_up_proj_bias(self) -> Tensor | None:
        """[E, 2I], or None."""
        return layout.sharded(self, "gate_up_proj_bias")

    @property
    def down_proj_bias(self) -> Tensor | None:
        """[E, D], or None."""
        return layout.sharded(self, "down_proj_bias")

    def stacked_grads(self) -> dict[str, Tensor]:
        """TE's gradients, stacked; absent where an expert has none."""
        return layout.stacked_grads(self)

    def init_weights(self, buffer_device: torch.device, init_std: float = 0.02) -> None:
        """TE's own reset: normal weights with TE's deviation, zero biases. `init_std` is not used."""
        with buffer_device:
            for name in LINEARS:
                getattr(self, name).reset_parameters()

    def _make_linear(self, in_features: int, out_features: int, device: torch.device) -> nn.Module:
        import transformer_engine.pytorch as te

        linear: nn.Module = te.GroupedLinear(
            self.n_local_experts,
            in_features,
            out_features,
            bias=self.config.expert_bias,
            # biases are added here: the down projection's is weighted, which TE's own addition would not do
            return_bias=self.config.expert_bias,
            params_dtype=self.config.dtype,
            device=device,
        )
        return linear

    def _multiply(self, linear: nn.Module, rows: Tensor, rows_per_expert: list[int]) -> Tensor:
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        fp8 = FP8GlobalStateManager.is_fp8_enabled()
        sizes = rows_per_expert
        if fp8:
            alignment = library.alignment(FP8GlobalStateManager.get_fp8_recipe().mxfp8())
            rows, sizes = te.Fp8Padding(len(sizes), alignment)(rows.contiguous(), sizes)
        # TE casts parameters of another dtype than the rows' under autocast alone
        other_dtype = rows.dtype is not linear.weight0.dtype
        with torch.autocast("cuda", dtype=rows.dtype, enabled=other_dtype):
            result = linear(rows.contiguous(), sizes, is_first_microbatch=self._is_first_microbatch)
        product: Tensor = result[0] if isinstance(result, tuple) else result
        if fp8 and sizes != rows_per_expert:
            product = te.Fp8Unpadding(len(sizes), alignment)(product, rows_per_expert)
        return product

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.te_fp8 is None:
            return contextlib.nullcontext()
        import transformer_engine.pytorch as te

        context: contextlib.AbstractContextManager[None] = te.autocast(enabled=True, recipe=library.recipe(self.te_fp8))
        return context

    @torch.no_grad()
    def _shard_parameters(self, ep_mesh: DeviceMesh) -> None:
        first, local = self.first_local_expert, self.n_local_experts
        for name in LINEARS:
            linear = getattr(self, name)
            if linear.num_gemms == local:
                continue
            kept = {
                f"{kind}{index}": getattr(linear, f"{kind}{first + index}")
                for kind in ("weight", "bias")[: 1 + self.config.expert_bias]
                for index in range(local)
            }
            share = self._make_linear(linear.in_features, linear.out_features, linear.weight0.device)
            for key, value in kept.items():
                getattr(share, key).copy_(value).requires_grad_(value.requires_grad)
            setattr(self, name, share)


class CachedWeightsTE(GroupedExpertsTE):
    """FP8 weights are quantised in the first call after they were loaded, and kept, as over a step's microbatches."""

    #: An optimizer's update in place goes unnoticed: `moebench parity` does not ask for it.
    caches_weights = True

    def __init__(self, config: MoEConfig, backend: BackendConfig | None = None) -> None:
        super().__init__(config, backend)
        self._kept = False
        self.register_load_state_dict_post_hook(_forget_kept)

    def init_weights(self, buffer_device: torch.device, init_std: float = 0.02) -> None:
        """As `GroupedExpertsTE.init_weights`; what was kept is quantised anew."""
        super().init_weights(buffer_device, init_std)
        self._kept = False

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor,
        weights: Tensor,
        indices: Tensor,
        is_first_microbatch: bool | None = None,
    ) -> Tensor:
        """As `GroupedExpertsTE.forward` with `is_first_microbatch` False from the second call on."""
        first = not self._kept if is_first_microbatch is None else is_first_microbatch
        self._kept = True
        return super().forward(x, token_mask, weights, indices, first)


def _forget_kept(module: nn.Module, _: Any) -> None:
    assert isinstance(module, CachedWeightsTE)
    module._kept = False
