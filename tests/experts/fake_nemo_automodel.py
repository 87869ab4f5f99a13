"""A fake of NeMo AutoModel 0.7's three expert layers in plain torch: arguments, parameters, state dict and limits.

Its DeepEP layers call `deep_ep`, and its layer on Transformer Engine has `GroupedLinear`s, so other fakes must be
installed with it. A test that has AutoModel runs AutoModel's own layers in the same way.
"""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collective
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor, Shard

GATED = ("swiglu", "geglu")


@dataclass(kw_only=True)
class MoEConfig:
    """The fields of AutoModel's configuration without a default, and those of the experts."""

    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    n_expert_groups: int
    n_limited_groups: int
    train_gate: bool
    gate_bias_update_factor: float
    aux_loss_coeff: float
    score_func: str
    route_scale: float
    dim: int
    inter_dim: int
    moe_inter_dim: int
    norm_topk_prob: bool
    expert_bias: bool = False
    expert_activation: str = "swiglu"
    apply_router_weight_after_down: bool = False
    activation_alpha: float = 1.702
    activation_limit: float = 7.0
    swiglu_limit: float = 0.0
    dtype: torch.dtype = torch.bfloat16


class _Stacked(nn.Module):
    def __init__(self, config: MoEConfig, backend: Any) -> None:
        super().__init__()
        assert backend.experts == "torch_mm"
        assert not backend.compile_router_weight
        self.config, self.n_routed_experts = config, config.n_routed_experts
        up = config.moe_inter_dim * (2 if config.expert_activation in GATED else 1)
        shapes = {"gate_and_up_projs": (config.dim, up), "down_projs": (config.moe_inter_dim, config.dim)}
        if config.expert_bias:
            shapes |= {"gate_up_proj_bias": (up,), "down_proj_bias": (config.dim,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(config.n_routed_experts, *shape, dtype=config.dtype)))

    def local(self) -> list[Tensor | None]:
        names = ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias")
        return [getattr(self, name).to_local() if hasattr(self, name) else None for name in names]


class GroupedExperts(_Stacked):
    """Gathers all ranks' tokens if its parameters are DTensors. It has no method that spreads the experts."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        mesh = self.gate_and_up_projs.device_mesh
        group, count, rank = mesh.get_group(), self.n_routed_experts // mesh.size(), mesh.get_local_rank()
        lengths: list[Any] = [None] * mesh.size()
        dist.all_gather_object(lengths, len(x), group=group)
        indices = indices.masked_fill(~token_mask.unsqueeze(-1), -1)
        padded = (nn.functional.pad(t, (0, 0, 0, max(lengths) - len(x))) for t in (x, weights, indices.double()))
        gathered = (collective.all_gather(t, group=group) for t in padded)
        x, weights, indices = (
            torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]) for parts in gathered
        )
        y = _compute(x, weights, indices.long() - rank * count, self.local(), self.config)
        y = collective.all_reduce(y, group=group)
        return y.split(lengths)[rank]


class GroupedExpertsDeepEP(_Stacked):
    """Sends tokens with DeepEP. Its parameters must be DTensors."""

    def __init__(self, config: MoEConfig, backend: Any, dispatcher_share_token_dispatcher: bool = True) -> None:
        super().__init__(config, backend)
        assert not backend.benchmark_static_routing
        self.shares = dispatcher_share_token_dispatcher

    def init_token_dispatcher(self, ep_mesh: Any) -> None:
        self.token_dispatcher = Dispatcher.of(self.shares, ep_mesh, self.config)
        _buffer_for(ep_mesh.get_group(), self.config.dim * 2)

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        x_R, weights_R, indices_R = self.token_dispatcher.send(x, token_mask, weights, indices)
        return self.token_dispatcher.back(_compute(x_R, weights_R, indices_R, self.local(), self.config))


class GroupedExpertsTE(nn.Module):
    """Sends tokens with DeepEP. Its parameters are those of GroupedLinears, on the meta device until `init_weights`."""

    def __init__(self, config: MoEConfig, backend: Any, dispatcher_share_token_dispatcher: bool = True) -> None:
        assert not config.apply_router_weight_after_down
        super().__init__()
        assert not backend.benchmark_static_routing
        assert not backend.te_grouped_tensor
        self.config, self.shares = config, dispatcher_share_token_dispatcher
        self._make(config.n_routed_experts)

    def _make(self, count: int) -> None:
        from transformer_engine.pytorch import GroupedLinear

        config = self.config
        up = config.moe_inter_dim * (2 if config.expert_activation in GATED else 1)
        options: dict[str, Any] = {"bias": config.expert_bias, "params_dtype": config.dtype, "device": "meta"}
        self.gate_up_linear = GroupedLinear(count, config.dim, up, **options)
        self.down_linear = GroupedLinear(count, config.moe_inter_dim, config.dim, **options)

    def init_token_dispatcher(self, ep_mesh: Any, moe_mesh: Any = None) -> None:
        self.mesh = ep_mesh
        self._make(self.config.n_routed_experts // ep_mesh.size())
        self.token_dispatcher = Dispatcher.of(self.shares, ep_mesh, self.config)

    def init_weights(self, buffer_device: torch.device) -> None:
        self.gate_up_linear.reset_parameters()
        self.down_linear.reset_parameters()

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        x_R, weights_R, indices_R = self.token_dispatcher.send(x, token_mask, weights, indices)
        parameters = [self._stacked(*where) for where in self._places().values()]
        parameters += [None] * (4 - len(parameters))
        return self.token_dispatcher.back(_compute(x_R, weights_R, indices_R, parameters, self.config))

    def _places(self) -> dict[str, tuple[Any, str]]:
        found: dict[str, tuple[Any, str]] = {
            "gate_and_up_projs": (self.gate_up_linear, "weight"),
            "down_projs": (self.down_linear, "weight"),
        }
        if self.config.expert_bias:
            found |= {"gate_up_proj_bias": (self.gate_up_linear, "bias"), "down_proj_bias": (self.down_linear, "bias")}
        return found

    def _stacked(self, linear: Any, kind: str) -> Tensor:
        stacked = torch.stack([getattr(linear, f"{kind}{index}") for index in range(linear.num_gemms)])
        return stacked.mT if kind == "weight" else stacked

    def state_dict(self, *_: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        found = {} if destination is None else destination
        for name, where in self._places().items():
            found[prefix + name] = DTensor.from_local(self._stacked(*where).detach(), self.mesh, [Shard(0)])
        return found

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, _: Any, strict: bool, missing_keys: list[str], *__: Any
    ) -> None:
        for name, (linear, kind) in self._places().items():
            if prefix + name not in state_dict:
                missing_keys.append(prefix + name)
                continue
            stacked = state_dict[prefix + name].to_local()
            for index in range(linear.num_gemms):
                getattr(linear, f"{kind}{index}").copy_(stacked[index].mT if kind == "weight" else stacked[index])


class Dispatcher:
    """Sends tokens with `deep_ep`. Layers that share a dispatcher share the first layer's."""

    shared: "Dispatcher | None" = None

    def __init__(self, ep_mesh: Any, config: MoEConfig) -> None:
        self.group, self.n_routed_experts = ep_mesh.get_group(), config.n_routed_experts

    @classmethod
    def of(cls, shares: bool, ep_mesh: Any, config: MoEConfig) -> "Dispatcher":
        if not shares:
            return cls(ep_mesh, config)
        cls.shared = cls.shared or cls(ep_mesh, config)
        return cls.shared

    def send(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices = indices.masked_fill(~token_mask.unsqueeze(-1), -1)
        x_R, weights_R, indices_R, self.handle = _Send.apply(x.contiguous(), weights.float(), indices, self)
        return x_R, weights_R, indices_R

    def back(self, y: Tensor) -> Tensor:
        output: Tensor = _Back.apply(y, self.handle, self.group)
        return output


class _Send(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, indices: Tensor, dispatcher: Dispatcher) -> Any:
        buffer = _buffer_for(dispatcher.group, 2 * x.shape[1])
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(
            indices, dispatcher.n_routed_experts
        )
        sizes = per_rank, per_rdma_rank, is_in_rank, per_expert
        x_R, indices_R, weights_R, _, ctx.handle, _ = buffer.dispatch(x, None, *sizes, indices, weights)
        ctx.group = dispatcher.group
        ctx.mark_non_differentiable(indices_R)
        return x_R, weights_R, indices_R, ctx.handle

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor, *_: Any) -> Any:
        buffer = _buffer_for(ctx.group, 2 * grad_x.shape[1])
        grad_x, grad_weights, _ = buffer.combine(grad_x.contiguous(), ctx.handle, grad_weights.contiguous())
        return grad_x, grad_weights, None, None


class _Back(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, handle: Any, group: Any) -> Tensor:
        ctx.handle, ctx.group = handle, group
        output: Tensor = _buffer_for(group, 2 * y.shape[1]).combine(y, handle)[0]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _buffer_for(ctx.group, 2 * grad.shape[1]).dispatch(grad.contiguous(), ctx.handle)[0], None, None


def _compute(x: Tensor, weights: Tensor, indices: Tensor, parameters: list[Any], config: MoEConfig) -> Tensor:
    """Return the sum of the local experts' outputs for each row. Other indices are those of other ranks' experts."""
    up, down, up_bias, down_bias = parameters
    after = config.apply_router_weight_after_down
    y = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(len(up)):
        rows, choices = (indices == expert).nonzero(as_tuple=True)
        weight = weights[rows, choices].unsqueeze(1)
        hidden = x[rows] @ up[expert] + (0 if up_bias is None else up_bias[expert])
        gate, linear = hidden.float().chunk(2, dim=-1)
        gelu, silu = nn.functional.gelu(gate, approximate="tanh"), nn.functional.silu(gate)
        active = (gelu if config.expert_activation == "geglu" else silu) * linear
        part = (active * (1 if after else weight)).to(x.dtype) @ down[expert]
        part = part.float() + (0 if down_bias is None else down_bias[expert] * (1 if after else weight))
        y = y.index_add(0, rows, part * weight if after else part)
    return y.to(x.dtype)


#: What AutoModel's module of DeepEP keeps: one buffer per process, which a larger one replaces without freeing it.
_kept: Any = ModuleType("nemo_automodel.components.moe.megatron.fused_a2a")
_kept._buffer = None


def _buffer_for(group: Any, hidden_bytes: int) -> Any:
    from deep_ep import Buffer

    configs = Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size())
    needed = max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size()) for config in configs)
    if _kept._buffer is None or _kept._buffer.num_nvl_bytes < needed:
        _kept._buffer = Buffer(group, needed, 0, explicitly_destroy=True)
    return _kept._buffer


def free_buffer() -> None:
    """Destroy the buffer."""
    if _kept._buffer is not None:
        _kept._buffer.destroy()
        _kept._buffer = None


_kept.free_buffer = free_buffer


def install(patch: pytest.MonkeyPatch) -> None:
    """Make the fake's modules importable."""
    names = ("", ".components", ".components.moe", ".components.moe.megatron")
    made: dict[str, Any] = {f"nemo_automodel{name}": ModuleType(f"nemo_automodel{name}") for name in names}
    for name in ("config", "experts"):
        made[f"nemo_automodel.components.moe.{name}"] = ModuleType(f"nemo_automodel.components.moe.{name}")
    made["nemo_automodel.components.moe.config"].MoEConfig = MoEConfig
    for layer in (GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE):
        setattr(made["nemo_automodel.components.moe.experts"], layer.__name__, layer)
    made[_kept.__name__] = _kept
    for name, module in made.items():
        patch.setitem(sys.modules, name, module)
