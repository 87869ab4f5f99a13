"""Convert between the stacked layout and Transformer Engine's (TE's) parameters, one matrix [out, in] per expert.

The functions work on every layer with the two linears of TE that `LINEARS` names. If FSDP shards TE's parameters, these
are DTensors over FSDP's mesh, and a stacked parameter is a DTensor over that mesh and the expert-parallel mesh.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experts.errors import ConfigError, InputError
from experts.layer import ExpertLayer
from experts.state_dict import as_local, is_dtensor, joined, let_fsdp_shard, local_share

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

LINEARS = ("gate_up_linear", "down_linear")
#: Name of a stacked parameter -> the linear that keeps it, and the name of the per-expert parameters in that linear.
KEPT_IN = {
    "gate_and_up_projs": ("gate_up_linear", "weight"),
    "down_projs": ("down_linear", "weight"),
    "gate_up_proj_bias": ("gate_up_linear", "bias"),
    "down_proj_bias": ("down_linear", "bias"),
}


def names(layer: ExpertLayer) -> list[str]:
    """Return the names of the layer's stacked parameters."""
    return [name for name in KEPT_IN if _parts(layer, name)]


def stacked(layer: ExpertLayer, name: str) -> Tensor | None:
    """Return this rank's stacked parameter, made from TE's parameters, or None for a bias without `expert_bias`."""
    parts = _parts(layer, name)
    return _stack(parts) if parts else None


def sharded(layer: ExpertLayer, name: str) -> Tensor | None:
    """Return what `stacked` returns, as a DTensor of all experts if expert parallelism or FSDP has spread the experts.

    FSDP's dimensions of the mesh come first, as in the DTensors that FSDP makes from DTensors.
    """
    parts = _parts(layer, name)
    if not parts:
        return None
    return _of_all_ranks(layer, _stack(parts), parts[0])


def stacked_property(name: str, shape: str) -> property:
    """Return a layer's property whose value is what `sharded` returns, and which `assign` sets."""

    def set_to(layer: Any, value: Tensor | None) -> None:
        assign(layer, name, value)
        layer._weights_loaded()

    return property(lambda layer: sharded(layer, name), set_to, doc=f"{name} {shape}, stacked from TE's parameters.")


def stacked_grads(layer: ExpertLayer) -> dict[str, Tensor]:
    """Return TE's gradients, stacked. A parameter has no entry if any expert has no gradient."""
    grads = {}
    for name in KEPT_IN:
        parts = [part.grad for part in _parts(layer, name)]
        if parts and all(part is not None for part in parts):
            grads[name] = _stack(parts)
    return grads


def stack_keys(layer: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Replace TE's entries in a state dict by stacked entries (a state dict hook)."""
    assert isinstance(layer, ExpertLayer)
    for key in [key for key in state_dict if key.startswith(tuple(f"{prefix}{name}." for name in LINEARS))]:
        del state_dict[key]
    with torch.no_grad():
        state_dict.update({prefix + name: sharded(layer, name) for name in names(layer)})


def load(
    layer: ExpertLayer, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], missing: list[str]
) -> list[str]:
    """Load TE's parameters from the stacked entries of a state dict, and return the mistakes.

    Adds the stacked names without an entry to `missing`. With `assign=True`, TE's new parameters are contiguous copies,
    because TE reads a matrix as if it were contiguous.
    """
    mistakes: list[str] = []
    entries: dict[str, Tensor] = {}
    for name in names(layer):
        linear, kind = KEPT_IN[name]
        own = [f"{prefix}{linear}.{kind}{index}" for index in range(layer.n_local_experts)]
        value = state_dict.get(prefix + name)
        if value is None:
            if not all(key in state_dict for key in own):
                missing.append(prefix + name)
            continue
        for key in own:
            state_dict.pop(key, None)  # the stacked entry has its experts too
        try:
            entries.update(zip(own, split(layer, name, value), strict=True))
        except (ConfigError, InputError) as error:
            mistakes.append(f"size mismatch for {prefix}{error}" if isinstance(error, InputError) else str(error))
    if metadata.get("assign_to_params_buffers", False):
        entries = {key: value.contiguous() for key, value in entries.items()}
    for linear in LINEARS:
        state_dict.pop(f"{prefix}{linear}._extra_state", None)  # FP8 scales are not loaded; TE finds them again
        getattr(layer, linear)._load_from_state_dict(entries, f"{prefix}{linear}.", metadata, False, [], [], mistakes)
    return mistakes


def assign(layer: ExpertLayer, name: str, value: Tensor | None) -> None:
    """Copy a stacked tensor into TE's parameters.

    The tensor holds all experts, or it is a plain tensor of this rank's experts. Raises InputError for another shape,
    and if the value and the layer's bias are not both None.
    """
    parts = _sharded_parts(layer, name)
    if value is None or not parts:
        if value is not None or parts:
            raise InputError(f"{name} cannot become {_shape(value)}: this layer has {_shape_of_all(layer, parts)}")
        return
    with torch.no_grad():
        for part, matrix in zip(parts, split(layer, name, value, local_too=True), strict=True):
            part.copy_(matrix)


def split(layer: ExpertLayer, name: str, value: Tensor, local_too: bool = False) -> list[Tensor]:
    """Return what the stacked value holds for each of TE's parameters on this rank, on their mesh if they have one.

    Where nothing has to move, the results are views. Raises InputError for another shape than that of all experts (or,
    with `local_too`, that of a plain tensor of this rank's experts). Raises ConfigError for a DTensor on a mesh that
    has nothing to do with this layer.
    """
    parts = _sharded_parts(layer, name)
    shape = _shape_of_all(layer, parts)
    is_local = local_too and not is_dtensor(value) and list(value.shape) == [len(parts), *shape[1:]]
    if list(value.shape) != shape and not is_local:
        raise InputError(f"{name}: the value has shape {list(value.shape)}, but the layer has {shape}")
    mesh, placements = _where(layer, parts[0])
    if is_dtensor(value) and mesh is not None and value.device_mesh == mesh:
        local = value.redistribute(mesh, placements).to_local()
        return [_like(part, matrix) for part, matrix in zip(parts, _matrices(local), strict=True)]
    whole = value if is_local else _experts_of_this_rank(layer, name, value)
    return [_distributed_like(part, matrix) for part, matrix in zip(parts, _matrices(whole), strict=True)]


def _experts_of_this_rank(layer: ExpertLayer, name: str, value: Tensor) -> Tensor:
    """Return a plain tensor [L, …] of this rank's experts."""
    from torch.distributed.tensor import Shard

    if not is_dtensor(value):
        return value if layer.ep_mesh is None else local_share(value, layer.ep_mesh)
    if layer.ep_mesh is None:
        return value.full_tensor()
    if value.device_mesh == layer.ep_mesh:
        return value.redistribute(layer.ep_mesh, [Shard(0)]).to_local()
    raise ConfigError(
        f"{name} is a DTensor on {value.device_mesh}, but this layer's experts are on {layer.ep_mesh}; pass a plain "
        "tensor of all experts, or let torch.distributed.checkpoint load into this layer's own state_dict()"
    )


def _where(layer: ExpertLayer, part: Tensor) -> "tuple[DeviceMesh | None, list[Placement]]":
    """Return the mesh and the placements of a stacked parameter of which `part` is one expert's, or no mesh."""
    if layer.ep_mesh is None and not is_dtensor(part):
        return None, []
    from torch.distributed.tensor import Shard

    of_experts = [] if layer.ep_mesh is None else [Shard(0)]
    if not is_dtensor(part):
        return layer.ep_mesh, [*of_experts]
    # [out, in] becomes [E, in, out], and [out] becomes [E, out]
    of_part = [Shard(part.ndim - placed.dim) if isinstance(placed, Shard) else placed for placed in part.placements]
    mesh = part.device_mesh if layer.ep_mesh is None else joined(part.device_mesh, layer.ep_mesh)
    return mesh, [*of_part, *of_experts]


def _of_all_ranks(layer: ExpertLayer, local: Tensor, part: Tensor) -> Tensor:
    mesh, placements = _where(layer, part)
    if mesh is None:
        return local
    from torch.distributed.tensor import DTensor

    shape = torch.Size(_shape_of_all(layer, [part]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _like(part: Tensor, matrix: Tensor) -> Tensor:
    """Return this rank's share of a parameter as a DTensor like the parameter, if the parameter is a DTensor."""
    if not is_dtensor(part):
        return matrix
    from torch.distributed.tensor import DTensor

    where = part.device_mesh, part.placements
    return DTensor.from_local(matrix, *where, run_check=False, shape=part.shape, stride=part.stride())


def _distributed_like(part: Tensor, matrix: Tensor) -> Tensor:
    """Return a whole parameter, which every rank has, distributed like the parameter."""
    if not is_dtensor(part):
        return matrix
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(matrix.detach(), part.device_mesh, part.placements, src_data_rank=None)


def _sharded_parts(layer: ExpertLayer, name: str) -> list[Any]:
    """Return TE's parameters as FSDP shards them, also if a forward has left them whole."""
    let_fsdp_shard(getattr(layer, KEPT_IN[name][0]))
    return _parts(layer, name)


def _parts(layer: ExpertLayer, name: str) -> list[Any]:
    linear, kind = KEPT_IN[name]
    if kind == "bias" and not layer.config.expert_bias:
        return []
    return [getattr(getattr(layer, linear), f"{kind}{index}") for index in range(layer.n_local_experts)]


def _stack(parts: Iterable[Any]) -> Tensor:
    """Return [L, in, out] from L matrices [out, in], or [L, out] from L vectors [out]: what this rank has of them."""
    local = (as_local(part) for part in parts)
    return torch.stack([part.t() if part.ndim == 2 else part for part in local])


def _matrices(stacked: Tensor) -> list[Tensor]:
    """Undo `_stack`, with views."""
    return [part.t() if part.ndim == 2 else part for part in stacked.unbind(0)]


def _shape(value: Tensor | None) -> list[int] | None:
    return None if value is None else list(value.shape)


def _shape_of_all(layer: ExpertLayer, parts: list[Any]) -> Any:
    return [layer.n_routed_experts, *reversed(parts[0].shape)] if parts else None
