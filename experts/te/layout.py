"""Convert between the stacked layout and Transformer Engine's (TE's) parameters, one matrix [out, in] per expert.

The functions work on every layer with the two linears of TE that `LINEARS` names. The hooks are for the layer's state
dict.
"""

from typing import Any

import torch
from torch import Tensor, nn

from experts import state_dict as shares
from experts.layer import ExpertLayer
from experts.state_dict import as_local, is_dtensor, local_share

LINEARS = ("gate_up_linear", "down_linear")
#: Name of a stacked parameter -> the linear that keeps it, and the name of the per-expert parameters in that linear.
KEPT_IN = {
    "gate_and_up_projs": ("gate_up_linear", "weight"),
    "down_projs": ("down_linear", "weight"),
    "gate_up_proj_bias": ("gate_up_linear", "bias"),
    "down_proj_bias": ("down_linear", "bias"),
}


def stacked(layer: ExpertLayer, name: str) -> Tensor | None:
    """Return this rank's stacked parameter, made from TE's parameters, or None for a bias without `expert_bias`."""
    parts = _parts(layer, name)
    return _stack(parts) if parts else None


def sharded(layer: ExpertLayer, name: str) -> Tensor | None:
    """Return what `stacked` returns. Under expert parallelism, return it as a DTensor of all ranks' experts."""
    local = stacked(layer, name)
    if local is None or layer.ep_mesh is None:
        return local
    return shares.sharded(local, layer.ep_mesh)


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
        entries = {name: sharded(layer, name) for name in KEPT_IN}
    state_dict.update({prefix + name: entry for name, entry in entries.items() if entry is not None})


def split_keys(
    layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Replace each stacked entry by one view per expert of this rank, for the linears to load (a hook before a load).

    With `assign=True` the new entries are contiguous copies, because TE reads a matrix as if it were contiguous.
    """
    assert isinstance(layer, ExpertLayer)
    keeps = local_metadata.get("assign_to_params_buffers", False)
    for name, (linear, kind) in KEPT_IN.items():
        whole = state_dict.get(prefix + name)
        if whole is None or not _parts(layer, name):
            continue
        del state_dict[prefix + name]
        if not is_dtensor(whole) and layer.ep_mesh is not None:
            whole = local_share(whole, layer.ep_mesh)
        for index, part in enumerate(as_local(whole).unbind(0)):
            matrix = part.t() if part.ndim == 2 else part
            state_dict[f"{prefix}{linear}.{kind}{index}"] = matrix.contiguous() if keeps else matrix
    for name in LINEARS:
        state_dict.setdefault(f"{prefix}{name}._extra_state", None)  # FP8 scales are not loaded; TE finds them again


def name_missing_keys(_: nn.Module, incompatible: Any) -> None:
    """In the list of missing keys, replace the keys of the experts by one stacked name (a hook after a load)."""
    for name, (linear, kind) in KEPT_IN.items():
        missing = [key for key in incompatible.missing_keys if f"{linear}.{kind}" in key]
        if missing:
            prefix = missing[0].partition(linear)[0]
            incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in missing]
            incompatible.missing_keys.append(prefix + name)


def _parts(layer: ExpertLayer, name: str) -> list[Any]:
    linear, kind = KEPT_IN[name]
    if kind == "bias" and not layer.config.expert_bias:
        return []
    return [getattr(getattr(layer, linear), f"{kind}{index}") for index in range(layer.n_local_experts)]


def _stack(parts: list[Any]) -> Tensor:
    """Return [L, in, out] from L matrices [out, in], or [L, out] from L vectors [out]."""
    return torch.stack([part.t() if part.ndim == 2 else part for part in parts])
