"""Define `GroupedExpertsTE`, the layer that Transformer Engine (TE) computes in bfloat16, float16, float32 or FP8.

TE's `GroupedLinear` computes the projections. The layer keeps TE's parameters, one matrix [out, in] per expert. The
layer's properties and state dict have the stacked layout, which all layers share.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from experts.adopt import backend_config, moe_config
from experts.compute.grouped import GroupedProduct, grouped_experts, no_rows
from experts.config import BackendConfig, MoEConfig, dtype_name, is_gated_activation
from experts.errors import ConfigError, Unsupported
from experts.layer import ExpertLayer
from experts.permutation import sort_by_expert
from experts.te import layout, library
from experts.te.layout import LINEARS

#: The number of rows of each group: on the host, or a tensor [L] int64 on the device.
Sizes = list[int] | Tensor


class GroupedExpertsTE(ExpertLayer):
    """The routed experts of one layer, computed by Transformer Engine. The default dispatcher is `deepep`.

    `backend.te_fp8` names an FP8 recipe for the two projections. Without a recipe, a `te.autocast` around the call
    applies. TE's parameters are `gate_up_linear.weight{i}` [2I, D] ([I, D] ungated), `down_linear.weight{i}` [D, I] and
    the biases of the two linears. The stacked parameters are properties, which are made from TE's parameters. The state
    dict holds the stacked parameters.

    Raises Unsupported if Transformer Engine does not import. Raises ConfigError if `backend` names another engine, or
    sets `save`, `fp8_rows` or `gradient_accumulation_fusion`.
    """

    #: True: the library frees what forward saved in the first backward, also with retain_graph. So `moebench parity`
    #: runs only one backward of a call.
    backward_once = True

    gate_up_linear: Any
    down_linear: Any

    # The weights and biases, stacked from TE's. A bias is None without `expert_bias`. Under expert parallelism and FSDP
    # they are DTensors of all experts. They take new values as `layout.assign` does.
    gate_and_up_projs: Any = layout.stacked_property("gate_and_up_projs", "[E, D, 2I] ([E, D, I] ungated)")
    down_projs: Any = layout.stacked_property("down_projs", "[E, I, D]")
    gate_up_proj_bias: Any = layout.stacked_property("gate_up_proj_bias", "[E, 2I] ([E, I] ungated)")
    down_proj_bias: Any = layout.stacked_property("down_proj_bias", "[E, D]")

    def __init__(self, config: MoEConfig, backend: BackendConfig | None = None) -> None:
        config, backend = moe_config(config), backend_config(backend)
        if backend.experts not in (None, "te"):
            raise ConfigError(f"GroupedExpertsTE computes with te, not {backend.experts!r}; use GroupedExperts for it")
        if backend.save is not None:
            raise ConfigError(f"save = {backend.save!r}: te cannot choose what it keeps for backward; leave save out")
        if backend.fp8_rows is not None:
            raise ConfigError(f"fp8_rows = {backend.fp8_rows}: te does not take rows in FP8; leave fp8_rows out")
        if backend.gradient_accumulation_fusion:
            raise ConfigError(
                "gradient_accumulation_fusion = True: GroupedExpertsTE does not add to main gradients; use the engine "
                "triton, or leave gradient_accumulation_fusion out"
            )
        missing = library.not_installed()
        if missing is not None:
            raise missing
        super().__init__(config, backend, "te", backend.dispatcher or "deepep")
        self.te_fp8 = backend.te_fp8
        up = config.moe_inter_dim * (2 if is_gated_activation(config.expert_activation) else 1)
        self.gate_up_linear = self._make_linear(config.dim, up, torch.get_default_device())
        self.down_linear = self._make_linear(config.moe_inter_dim, config.dim, torch.get_default_device())
        self._is_first_microbatch: bool | None = None
        self.register_state_dict_post_hook(layout.stack_keys)
        self._loaded_prefix = ""
        self.register_load_state_dict_post_hook(_forget_own_names)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor,
        weights: Tensor,
        indices: Tensor,
        is_first_microbatch: bool | None = None,
    ) -> Tensor:
        """Return what `ExpertLayer.forward` returns.

        If `is_first_microbatch` is None, the call quantises the FP8 weights and does not keep the quantised weights. If
        it is True, the call quantises the weights and keeps the quantised weights. If it is False, the call uses the
        quantised weights that were kept, which is correct only while the weights do not change.
        """
        self._is_first_microbatch = is_first_microbatch
        return super().forward(x, token_mask, weights, indices)

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        """Return what two GroupedLinears compute from rows sorted by expert; see `ExpertLayer.compute_local`.

        If TE takes the sizes of the groups on the host, every call waits for the device.
        """
        permutation = sort_by_expert(indices_RK, self.first_local_expert, self.n_local_experts)
        sizes: Sizes = permutation.tokens_per_expert_L
        if not self.takes_sizes_on_device(x_RD.dtype):
            sizes = permutation.tokens_per_expert_L.tolist()
            permutation = permutation.cut(sum(sizes))
        if permutation.num_rows == 0:
            return no_rows(x_RD, (weights_RK, *self.parameters()))

        def by(linear: nn.Module) -> GroupedProduct:
            return lambda rows: self._multiply(linear, rows, sizes)

        biases = (layout.stacked(self, name) for name in ("gate_up_proj_bias", "down_proj_bias"))
        with self._autocast():
            products = by(self.gate_up_linear), by(self.down_linear)
            return grouped_experts(x_RD, weights_RK, permutation, self.config, *products, *biases)

    def takes_sizes_on_device(self, dtype: torch.dtype) -> bool:
        """Return whether TE gets the sizes of the groups on the device, so that the call does not wait for the device.

        FP8 pads groups, and TE's padding takes sizes on the host. With expert parallelism, only the host can leave out
        the rows of other ranks' experts before it allocates memory. Rows must be multiples of 16 bytes.
        """
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        aligned = self.config.dim % 8 == 0 and self.config.moe_inter_dim % 8 == 0
        fp8 = self.te_fp8 is not None or FP8GlobalStateManager.is_fp8_enabled()
        few = self.ep_mesh is None and self.n_local_experts <= library.MOST_EXPERTS
        return few and aligned and not fp8 and library.takes_sizes_on_device(dtype)

    def _unsupported(self, device: torch.device, config: MoEConfig) -> Unsupported | None:
        """Return why TE cannot run with this layer's parameters and FP8 recipe, or None where it can."""
        kept = dtype_name(self.gate_up_linear.weight0.dtype)
        if config.dtype is torch.float32 and kept != "float32":
            return Unsupported(f"Transformer Engine computes float32 with float32 parameters, these are {kept}; cast x")
        return library.unsupported(device, config, self.te_fp8)

    def stacked_grads(self) -> dict[str, Tensor]:
        """Return TE's gradients, stacked. A parameter has no entry if any expert has no gradient."""
        return layout.stacked_grads(self)

    def init_weights(self, buffer_device: torch.device, init_std: float = 0.02) -> None:
        """Reset the parameters with TE's method, which ignores `init_std`.

        TE draws the weights from a normal distribution with a standard deviation of its choice, and sets biases to
        zero. TE makes new parameters for that, which here require a gradient if the old ones did.
        """
        wanted = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        with buffer_device:
            for name in LINEARS:
                getattr(self, name).reset_parameters()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(wanted[name])

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. A stacked parameter is set by its property, also if the value is an nn.Parameter."""
        if name in layout.KEPT_IN:
            object.__setattr__(self, name, value)  # nn.Module would register the nn.Parameter
        else:
            super().__setattr__(name, value)

    def _weights_loaded(self) -> None:
        """Do what is needed after the parameters have got other values."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any] | None,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the parameters of this layer, both linears included, from the stacked entries of a state dict.

        Callers that load one module at a time, as NeMo AutoModel's do, call this method without `load_state_dict`.
        """
        metadata, missing = local_metadata or {}, missing_keys if strict else []
        error_msgs += layout.load(self, state_dict, prefix, metadata, missing)
        self._loaded_prefix = prefix
        self._weights_loaded()
        known = [prefix + name for name in layout.names(self)]
        others = {key: value for key, value in state_dict.items() if key not in known}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _make_linear(self, in_features: int, out_features: int, device: torch.device) -> nn.Module:
        import transformer_engine.pytorch as te

        linear: nn.Module = te.GroupedLinear(
            self.n_local_experts,
            in_features,
            out_features,
            bias=self.config.expert_bias,
            # `grouped_experts` adds the biases: TE would add the down projection's bias without the routing weight
            return_bias=self.config.expert_bias,
            params_dtype=self.config.dtype,
            device=device,
        )
        return linear

    def _multiply(self, linear: Any, rows: Tensor, sizes: Sizes) -> Tensor:
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        padded = sizes
        if FP8GlobalStateManager.is_fp8_enabled():
            alignment = library.alignment(FP8GlobalStateManager.get_fp8_recipe().mxfp8())
            rows, padded = te.Fp8Padding(len(sizes), alignment)(rows.contiguous(), sizes)
        linear.use_grouped_tensor = isinstance(sizes, Tensor)  # if true, TE refuses sizes on the host
        # TE casts parameters to the rows' dtype only under autocast
        other_dtype = rows.dtype is not linear.weight0.dtype
        with torch.autocast("cuda", dtype=rows.dtype, enabled=other_dtype):
            result = linear(rows.contiguous(), padded, is_first_microbatch=self._is_first_microbatch)
        product: Tensor = result[0] if isinstance(result, tuple) else result
        if padded is not sizes and padded != sizes:
            product = te.Fp8Unpadding(len(sizes), alignment)(product, sizes)
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
    """A layer that quantises its FP8 weights in the first call after a load, and keeps the quantised weights.

    Training code that splits a batch into microbatches does the same between two steps of the optimizer.
    """

    #: True: the layer does not notice that an optimizer updates its parameters in place. So `moebench parity` does not
    #: take the step that updates parameters in place.
    caches_weights = True

    def __init__(self, config: MoEConfig, backend: BackendConfig | None = None) -> None:
        super().__init__(config, backend)
        self._kept = False

    def init_weights(self, buffer_device: torch.device, init_std: float = 0.02) -> None:
        """Reset as `GroupedExpertsTE.init_weights` does. The next call quantises the weights again."""
        super().init_weights(buffer_device, init_std)
        self._weights_loaded()

    def _weights_loaded(self) -> None:
        self._kept = False

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor,
        weights: Tensor,
        indices: Tensor,
        is_first_microbatch: bool | None = None,
    ) -> Tensor:
        """Return what `GroupedExpertsTE.forward` returns, with `is_first_microbatch` False from the second call on."""
        first = not self._kept if is_first_microbatch is None else is_first_microbatch
        self._kept = True
        return super().forward(x, token_mask, weights, indices, first)


def _forget_own_names(layer: nn.Module, incompatible: Any) -> None:
    """Take the keys of TE's own parameters, which the layer has loaded, out of the missing keys (a load hook)."""
    assert isinstance(layer, GroupedExpertsTE)
    own = tuple(f"{layer._loaded_prefix}{linear}." for linear in LINEARS)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith(own)]
