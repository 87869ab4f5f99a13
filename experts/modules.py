"""Define `GroupedExperts` and `GroupedExpertsDeepEP`, the layers for all engines that compute on stacked parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from experts import compiled, main_grads
from experts.adopt import backend_config, moe_config
from experts.compute import PARAMETER_NAMES, ExpertParameters
from experts.config import BackendConfig, MoEConfig, is_gated_activation
from experts.engines import engine_names, get_engine
from experts.errors import ConfigError, Unsupported
from experts.fp8.cache import WeightCache
from experts.layer import ExpertLayer, uncompiled_forward
from experts.state_dict import as_local, is_dtensor, let_fsdp_shard, local_share, sharded, sharded_like
from experts.steps import make_of_steps


def parameter_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each stacked parameter of the configuration, by name."""
    up = config.moe_inter_dim * (2 if is_gated_activation(config.expert_activation) else 1)
    shapes: dict[str, tuple[int, ...]] = {
        "gate_and_up_projs": (config.n_routed_experts, config.dim, up),
        "down_projs": (config.n_routed_experts, config.moe_inter_dim, config.dim),
    }
    if config.expert_bias:
        shapes["gate_up_proj_bias"] = (config.n_routed_experts, up)
        shapes["down_proj_bias"] = (config.n_routed_experts, config.dim)
    return shapes


class GroupedExperts(ExpertLayer):
    """The routed experts of one layer. The default engine is `loop`, and the default dispatcher is `allgather`.

    The parameters have `config.dtype`. They are `gate_and_up_projs` [E, D, 2I] ([E, D, I] ungated) and `down_projs`
    [E, I, D]. With `expert_bias`, the layer also has the parameters `gate_up_proj_bias` [E, 2I] ([E, I] ungated) and
    `down_proj_bias` [E, D]. Without `expert_bias`, the two biases are None. The parameters are uninitialised until
    `init_weights` or `load_state_dict`. Under expert parallelism the parameters are DTensors, sharded on dimension 0.

    Both configurations may be of other classes with the same fields, such as NeMo AutoModel's (`experts.adopt`).

    Raises ConfigError for the engine "te" and for an FP8 recipe, because these need `GroupedExpertsTE`. Raises
    ConfigError for `save` if the engine cannot choose what it keeps for backward, for `gradient_accumulation_fusion` if
    the engine does not add to main gradients, and for an option of another dispatcher.

    With `gradient_accumulation_fusion`, the parameters `gate_and_up_projs` and `down_projs` must have an attribute
    `main_grad` in each forward with gradients, if they require gradients: a contiguous float32 tensor of this rank's
    part. Set it after `init_token_dispatcher`. Backward adds to it and leaves `.grad` as it is. `experts.main_grads`
    describes the one exception. Biases get their gradients as without it.
    """

    default_engine = "loop"
    default_dispatcher = "allgather"

    gate_and_up_projs: nn.Parameter
    down_projs: nn.Parameter
    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(self, config: MoEConfig, backend: BackendConfig | None = None) -> None:
        config, backend = moe_config(config), backend_config(backend)
        self._refuse_te(backend)
        engine_name, dispatcher_name = (
            backend.experts or self.default_engine,
            backend.dispatcher or self.default_dispatcher,
        )
        super().__init__(config, backend, engine_name, dispatcher_name)
        self.engine = get_engine(self.engine_name)
        if backend.save is not None and not self.engine.saves:
            raise ConfigError(
                f"save = {backend.save!r}: the engine {self.engine_name} cannot choose what it keeps for backward; use "
                f"one of {', '.join(_engines_that('saves'))}, or leave save out"
            )
        self.engine_options: dict[str, Any] = {} if backend.save is None else {"save": backend.save}
        for option in ("fp8_gradients", "fp8_weight_gradients", "fp8_rows"):
            value = getattr(backend, option)
            if value is not None and not self.engine.fp8_formats:
                raise ConfigError(
                    f"{option} = {value!r}: the engine {self.engine_name} cannot choose what is in FP8; use "
                    f"{' or '.join(_engines_that('fp8_formats'))}, or leave {option} out"
                )
            if value is not None and option != "fp8_rows":  # an option of the dispatcher
                self.engine_options[option] = value
        self.gradient_accumulation_fusion = backend.gradient_accumulation_fusion
        if self.gradient_accumulation_fusion and not self.engine.accumulates:
            raise ConfigError(
                f"gradient_accumulation_fusion = True: the engine {self.engine_name} does not add to main gradients; "
                f"use {' or '.join(_engines_that('accumulates'))}, or leave gradient_accumulation_fusion out"
            )
        self.weight_cache = WeightCache() if self.engine.fp8 else None
        self._described_config = compiled.described(config)
        shapes = parameter_shapes(config)
        for name in PARAMETER_NAMES:
            empty = torch.empty(shapes[name], dtype=config.dtype) if name in shapes else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self.register_load_state_dict_pre_hook(_take_local_share)

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return what `ExpertLayer.forward` returns.

        If other code than `init_token_dispatcher` made the parameters DTensors, use the DTensors' mesh as the
        expert-parallel mesh.
        """
        if self.ep_mesh is None and is_dtensor(self.down_projs):
            self.init_token_dispatcher(self.down_projs.device_mesh)
        if torch.compiler.is_compiling() and (self.engine.fp8 or self.gradient_accumulation_fusion):
            # the operators of compiled layers know neither what FP8 needs nor main gradients
            output: Tensor = uncompiled_forward()(self, x, token_mask, weights, indices)
            return output
        return super().forward(x, token_mask, weights, indices)

    def extra_repr(self) -> str:
        """Return the text that `repr` shows: sizes, engine, `save`, and whether `experts.steps` are eager or fused."""
        parts = [super().extra_repr(), *(f"{name}={value}" for name, value in self.engine_options.items())]
        if self.engine_name != "loop":
            parts.append(f"steps={make_of_steps(self.down_projs.device, self.config.dtype)}")
        return ", ".join(parts)

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        """Return what the engine computes from this rank's parameters; see `ExpertLayer.compute_local`."""
        parameters = self.expert_parameters()
        if torch.compiler.is_compiling():
            return compiled.compute_local(
                *(x_RD, weights_RK, indices_RK, parameters, self.engine_name, self._described_config),
                first=self.first_local_expert,
                save=self.engine_options.get("save"),
                keep=self.engine.own_products is not None,
            )
        options = dict(self.engine_options)
        if self.weight_cache is not None:
            options["cache"] = self.weight_cache
        if self.gradient_accumulation_fusion and torch.is_grad_enabled():
            parameters, options["main_grads"] = main_grads.with_main_grads(self, parameters)
        return self.engine.compute(
            x_RD, weights_RK, indices_RK, parameters, self.config, self.first_local_expert, **options
        )

    def weights_changed(self) -> None:
        """Say that the parameters have got other values: an FP8 engine quantises them again in the next call.

        Call it after each step of an optimizer, and after any other code that writes to the parameters. The layer calls
        it itself when it loads, initialises, moves or shards its parameters. It does nothing for other engines.
        """
        self._quantise_again()

    def _quantise_again(self) -> None:
        if self.weight_cache is not None:
            self.weight_cache.stale = True

    @property
    def caches_weights(self) -> bool:
        """Whether the layer keeps quantised weights from call to call, until `weights_changed` is called."""
        return self.weight_cache is not None

    @property
    def cached_weight_bytes(self) -> int:
        """The bytes of the quantised weights that the layer keeps."""
        return 0 if self.weight_cache is None else self.weight_cache.num_bytes

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "GroupedExperts":
        moved: GroupedExperts = super()._apply(fn, recurse)
        self._quantise_again()
        return moved

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._quantise_again()

    def _unsupported(self, device: torch.device, config: MoEConfig) -> Unsupported | None:
        """Return the engine's reason, or None."""
        return self.engine.unsupported(device, config)

    def _check_supported(self, x: Tensor) -> None:
        if not torch.compiler.is_compiling():  # a compiled layer's engine checks it when it runs
            super()._check_supported(x)

    def expert_parameters(self) -> ExpertParameters:
        """Return the stacked parameters of this rank's experts.

        Raises ConfigError if the parameters do not hold `n_local_experts` experts.
        """
        parameters = ExpertParameters(*(as_local(getattr(self, name)) for name in PARAMETER_NAMES))
        count = parameters.down_projs.shape[0]
        if count != self.n_local_experts:
            raise ConfigError(
                f"this rank's parameters hold {count} experts, but need {self.n_local_experts} of the layer's "
                f"{self.n_routed_experts}; shard them once, on dimension 0 over ep_mesh"
            )
        return parameters

    def stacked_grads(self) -> dict[str, Tensor]:
        """Return the gradients of this rank's parameters by name. A parameter without a gradient has no entry.

        With `gradient_accumulation_fusion`, those of the weights are their main gradients.
        """
        found = {name: as_local(p.grad) for name, p in self.named_parameters() if p.grad is not None}
        if self.gradient_accumulation_fusion:
            of_weights = {name: main_grads.main_grad(getattr(self, name)) for name in main_grads.NAMES}
            found |= {name: grad for name, grad in of_weights.items() if grad is not None}
        return found

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device, init_std: float = 0.02) -> None:
        """Draw the projections from a normal distribution with standard deviation `init_std`, and set biases to zero.

        If parameters are on the meta device, they are first allocated on `buffer_device`.
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            self.to_empty(device=buffer_device)
        for name, parameter in self.named_parameters():
            self._draw_parameter(name, parameter, init_std)
        self._quantise_again()

    def _draw_parameter(self, name: str, parameter: Tensor, init_std: float) -> None:
        if is_dtensor(parameter) and parameter.device.type == "cpu":
            # on a CPU mesh, DTensor's normal_ warns and draws the same numbers on every rank
            whole = torch.empty(parameter.shape, dtype=parameter.dtype)
            self._draw(name, whole, init_std)
            parameter.to_local().copy_(sharded_like(whole, parameter).to_local())
        else:
            self._draw(name, parameter, init_std)

    def _draw(self, name: str, tensor: Tensor, init_std: float) -> None:
        """Fill the parameter of a name, or a plain tensor of its shape."""
        if name.endswith("bias"):
            tensor.zero_()
        else:
            tensor.normal_(std=init_std)

    def _refuse_te(self, backend: BackendConfig) -> None:
        if backend.experts == "te":
            name = type(self).__name__
            raise ConfigError(f"{name} cannot use the engine 'te', which keeps its own weights; use GroupedExpertsTE")
        if backend.te_fp8 is not None:
            raise ConfigError(
                f"te_fp8 = {backend.te_fp8!r} needs Transformer Engine, which {type(self).__name__} does not use; "
                "use GroupedExpertsTE, or leave te_fp8 out"
            )

    def _shard_parameters(self, ep_mesh: DeviceMesh) -> None:
        for name, parameter in list(self.named_parameters()):
            if not is_dtensor(parameter):
                share = sharded(local_share(parameter.detach(), ep_mesh).clone(), ep_mesh)
                setattr(self, name, nn.Parameter(share, requires_grad=parameter.requires_grad))
        self._quantise_again()


def _engines_that(do: str) -> list[str]:
    """Return the names of the engines whose attribute `do` is true."""
    return [name for name in engine_names() if getattr(get_engine(name), do)]


def _take_local_share(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Shard plain tensors of all experts like the parameters, so that each rank loads its own experts (a load hook)."""
    let_fsdp_shard(module)
    for name, parameter in module.named_parameters(recurse=False):
        value = state_dict.get(prefix + name)
        if not is_dtensor(parameter) or not isinstance(value, Tensor) or is_dtensor(value):
            continue
        if value.shape == parameter.shape:
            state_dict[prefix + name] = sharded_like(value, parameter)


class GroupedExpertsDeepEP(GroupedExperts):
    """The routed experts of one layer. The default engine is `gmm`, and the default dispatcher is `deepep`."""

    default_engine = "gmm"
    default_dispatcher = "deepep"
