"""Define `GroupedExpertsLoRA`: experts with frozen weights and trainable low-rank adapters (LoRA, arXiv 2106.09685)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from experts import catalog, compiled
from experts.activations import accumulation_dtype
from experts.compute import PARAMETER_NAMES, Adapters
from experts.config import DTYPES, BackendConfig, MoEConfig
from experts.engines import engine_names, get_engine
from experts.errors import ConfigError
from experts.modules import GroupedExperts, parameter_shapes
from experts.state_dict import as_local, is_dtensor

#: The names of the adapters, as NeMo AutoModel's `GroupedExpertsLoRA` has them, in the order of `Adapters`.
ADAPTER_NAMES = ("lora_gate_and_up_A", "lora_gate_and_up_B", "lora_down_A", "lora_down_B")
#: The projections that have adapters.
_PROJECTIONS = PARAMETER_NAMES[:2]


def adapter_shapes(config: MoEConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each stacked adapter of the configuration, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for (name_A, name_B), projection in zip((ADAPTER_NAMES[:2], ADAPTER_NAMES[2:]), _PROJECTIONS, strict=True):
        experts, rows, columns = parameter_shapes(config)[projection]
        shapes |= {name_A: (experts, rows, rank), name_B: (experts, rank, columns)}
    return shapes


class GroupedExpertsLoRA(GroupedExperts):
    """`GroupedExperts` whose weights are frozen, with trainable adapters of rank R beside both projections.

    An expert multiplies by weight + (alpha / rank) · A @ B. The adapters are `lora_gate_and_up_A` [E, D, R],
    `lora_gate_and_up_B` [E, R, 2I] ([E, R, I] ungated), `lora_down_A` [E, I, R] and `lora_down_B` [E, R, D]. They have
    `lora_dtype` (a name or a torch.dtype), or else `config.dtype`. The layer computes in x's dtype all the same. As in
    peft, A is drawn from a uniform distribution within ±1/√(rows of A), and B is zero, so that a new adapter changes
    nothing. The weights are uninitialised until `init_weights` or `load_state_dict`.

    There is no dropout. peft refuses it for stacked weights, too: dropout of an adapter's input would have to draw for
    every choice of a token, and the adapters could not be merged.

    Raises ConfigError for a rank that is not a positive integer, for an alpha that is not positive and finite, for an
    engine that does not compute with adapters, for `gradient_accumulation_fusion`, and for `save`: the layer keeps what
    "memory" keeps.
    """

    #: The rank and alpha of a layer that is built without them.
    lora = catalog.LORA

    lora_gate_and_up_A: nn.Parameter
    lora_gate_and_up_B: nn.Parameter
    lora_down_A: nn.Parameter
    lora_down_B: nn.Parameter

    def __init__(
        self,
        config: MoEConfig,
        backend: BackendConfig | None = None,
        rank: int = catalog.LORA.rank,
        alpha: float = catalog.LORA.alpha,
        lora_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(config, backend)
        self._check(rank, alpha)
        self.rank, self.alpha = rank, float(alpha)
        dtype = self.config.dtype if lora_dtype is None else DTYPES.get(str(lora_dtype).removeprefix("torch."))
        if dtype is None:
            raise ConfigError(f"lora_dtype = {lora_dtype!r} is no dtype of adapters; give one of {', '.join(DTYPES)}")
        self.requires_grad_(False)
        for name, shape in adapter_shapes(self.config, rank).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))
        #: While the adapters are merged: the frozen weights of this rank before, by name, in the host's memory.
        self._unmerged: dict[str, Tensor] = {}
        self.register_state_dict_post_hook(_show_unmerged)
        self.register_load_state_dict_pre_hook(_refuse_merged)
        if not self.lora_down_A.is_meta:
            self.init_lora_weights()

    @property
    def scale(self) -> float:
        """The factor of A @ B: alpha / rank."""
        return self.alpha / self.rank

    @property
    def merged(self) -> bool:
        """Whether the adapters are added to the weights."""
        return bool(self._unmerged)

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return what `ExpertLayer.forward` returns.

        Raises ConfigError if a frozen weight requires a gradient. Raises ConfigError in grad mode if the adapters are
        merged and require gradients, because they would get none.
        """
        for name in PARAMETER_NAMES:
            weight = getattr(self, name)
            if weight is not None and weight.requires_grad:
                raise ConfigError(
                    f"{name} requires a gradient, but the weights beside adapters are frozen; call "
                    f"{name}.requires_grad_(False), or train a GroupedExperts"
                )
        if self.merged and torch.is_grad_enabled() and any(getattr(self, name).requires_grad for name in ADAPTER_NAMES):
            raise ConfigError(
                "the adapters are merged into the weights and would get no gradients; call unmerge() before training, "
                "or run forward under torch.no_grad()"
            )
        return super().forward(x, token_mask, weights, indices)

    def compute_local(self, x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
        """Return what the engine computes with this rank's weights and adapters; see `ExpertLayer.compute_local`."""
        if self.merged:
            return super().compute_local(x_RD, weights_RK, indices_RK)
        parameters, adapters, first = self.expert_parameters(), self.expert_adapters(), self.first_local_expert
        if torch.compiler.is_compiling():
            settings = self.engine_name, self._described_config, first
            return compiled.compute_local(x_RD, weights_RK, indices_RK, parameters, *settings, adapters=adapters)
        return self.engine.compute(x_RD, weights_RK, indices_RK, parameters, self.config, first, adapters=adapters)

    def expert_adapters(self) -> Adapters:
        """Return the stacked adapters of this rank's experts, and their scale."""
        return Adapters(self.scale, *(as_local(getattr(self, name)) for name in ADAPTER_NAMES))

    @torch.no_grad()
    def init_lora_weights(self) -> None:
        """Draw new adapters: A from a uniform distribution within ±1/√(rows of A), and B zero."""
        for name in ADAPTER_NAMES:
            self._draw_parameter(name, getattr(self, name), init_std=0.0)

    @torch.no_grad()
    def merge(self) -> None:
        """Add alpha / rank · A @ B to the weights, so that forward takes as long as without adapters.

        The sum is computed in float32 (float64 for float64) and rounded to the weights' dtype. The weights before are
        kept in the host's memory, because subtracting A @ B from the rounded sum would not give them back. While the
        adapters are merged, the state dict still has the weights before. Raises ConfigError if they are merged already.
        """
        if self.merged:
            raise ConfigError("the adapters are merged already; call unmerge() first")
        adapters = self.expert_adapters()
        before = {name: as_local(getattr(self, name).detach()) for name in _PROJECTIONS}
        self._unmerged = {name: weight.to("cpu", copy=True) for name, weight in before.items()}
        for weight, (A, B) in zip(before.values(), (adapters.tensors[:2], adapters.tensors[2:]), strict=True):
            acc = accumulation_dtype(torch.promote_types(weight.dtype, A.dtype))
            for one, own_A, own_B in zip(weight, A, B, strict=True):  # one by one: the sum of all needs much memory
                one.copy_(torch.addmm(one.to(acc), own_A.to(acc), own_B.to(acc), alpha=self.scale))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the weights the bits that they had before `merge`. Raises ConfigError if nothing is merged."""
        if not self.merged:
            raise ConfigError("the adapters are not merged; call merge() first")
        for name, weight in self._unmerged.items():
            as_local(getattr(self, name).detach()).copy_(weight)
        self._unmerged = {}

    def lora_state_dict(self) -> dict[str, Any]:
        """Return the entries of the state dict that are adapters."""
        return {name: tensor for name, tensor in self.state_dict().items() if name in ADAPTER_NAMES}

    def load_lora_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load adapters alone. The weights stay as they are.

        Raises ConfigError unless the state dict has all four adapters and nothing else. Raises RuntimeError, as
        `load_state_dict` does, for a wrong shape.
        """
        if state_dict.keys() != set(ADAPTER_NAMES):
            raise ConfigError(
                f"a state dict of adapters has {', '.join(ADAPTER_NAMES)}, but this one has "
                f"{', '.join(state_dict) or 'nothing'}; load weights and adapters together with load_state_dict"
            )
        self.load_state_dict(state_dict, strict=False)

    def extra_repr(self) -> str:
        """Return the text of `GroupedExperts`, and the rank, alpha, and whether the adapters are merged."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"

    def _draw(self, name: str, tensor: Tensor, init_std: float) -> None:
        if name not in ADAPTER_NAMES:
            super()._draw(name, tensor, init_std)
        elif name.endswith("_B"):
            tensor.zero_()
        else:
            bound = 1 / math.sqrt(tensor.shape[1])  # what kaiming_uniform_(a=√5) draws for one expert's A
            tensor.uniform_(-bound, bound)

    def _check(self, rank: int, alpha: float) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigError(f"rank = {rank!r} must be a positive integer, for example 16")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise ConfigError(f"alpha = {alpha!r} must be a positive finite number, for example 32.0")
        if not self.engine.adapts:
            able = ", ".join(name for name in engine_names() if get_engine(name).adapts)
            raise ConfigError(f"the engine {self.engine_name} does not compute with adapters; use one of {able}")
        if self.engine_options:
            options = ", ".join(f"{name} = {value!r}" for name, value in self.engine_options.items())
            raise ConfigError(f"{options}: a layer with adapters keeps what save = 'memory' keeps; leave save out")
        if self.gradient_accumulation_fusion:
            raise ConfigError(
                "gradient_accumulation_fusion = True: the weights beside adapters are frozen, and adapters get their "
                "gradients as .grad; leave gradient_accumulation_fusion out"
            )


def _show_unmerged(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put the weights before `merge` into the state dict, so that adapters which are saved beside them count once."""
    assert isinstance(module, GroupedExpertsLoRA)
    for name, weight in module._unmerged.items():
        merged = state_dict[prefix + name]
        own = weight.to(merged.device, as_local(merged).dtype)
        if is_dtensor(merged):
            from torch.distributed.tensor import DTensor

            own = DTensor.from_local(
                own, merged.device_mesh, merged.placements, run_check=False, shape=merged.shape, stride=merged.stride()
            )
        state_dict[prefix + name] = own


def _refuse_merged(module: nn.Module, *_: Any) -> None:
    assert isinstance(module, GroupedExpertsLoRA)
    if module.merged:
        raise ConfigError("a layer with merged adapters cannot load: unmerge() would undo it; call unmerge() first")
