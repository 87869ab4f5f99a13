"""The base class of the peers: another library's module, its layout of the parameters and its form of the routing."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from experts import catalog
from experts.config import MoEConfig
from experts.errors import Unsupported

R = TypeVar("R")


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """Return [E, in, out] from [E, out, in], or the reverse, as a view."""
    return tensor.mT


@dataclass(frozen=True)
class Kept:
    """The name of the peer's parameter that holds a stacked one, and the functions between the two layouts."""

    name: str
    to_peer: Callable[[Tensor], Tensor] = as_it_is
    to_stacked: Callable[[Tensor], Tensor] = as_it_is


class PeerExperts(nn.Module):
    """The module `peer` of another library, on one process.

    `layout` maps each stacked name to the peer's parameter. An optimizer trains the peer's own parameters. State dicts
    and `stacked_grads` have the stacked layout.
    """

    def __init__(self, config: MoEConfig, peer: nn.Module, layout: Mapping[str, Kept]) -> None:
        super().__init__()
        self.config = config
        self.n_routed_experts = config.n_routed_experts
        self.peer = peer
        self.layout = layout
        self.register_state_dict_post_hook(_stack_keys)
        self.register_load_state_dict_pre_hook(_peer_keys)

    def stacked_grads(self) -> dict[str, Tensor]:
        """Return the peer's gradients in the stacked layout. A parameter without a gradient has no entry."""
        grads = {name: getattr(self.peer, kept.name).grad for name, kept in self.layout.items()}
        return {name: self.layout[name].to_stacked(grad) for name, grad in grads.items() if grad is not None}


def _stack_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(module, PeerExperts)
    for name, kept in module.layout.items():
        state_dict[prefix + name] = kept.to_stacked(state_dict.pop(f"{prefix}peer.{kept.name}"))


def _peer_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Replace stacked entries by entries in the peer's layout; with `assign=True` they are contiguous copies."""
    assert isinstance(module, PeerExperts)
    keeps = local_metadata.get("assign_to_params_buffers", False)
    for name, kept in module.layout.items():
        if prefix + name in state_dict:
            own = kept.to_peer(state_dict.pop(prefix + name))
            state_dict[f"{prefix}peer.{kept.name}"] = own.contiguous() if keeps else own


class Translated(Generic[R]):
    """The token mask and indices in a peer's own form, made again only for new or changed tensors.

    In its own library a router passes this form to the peer, so the time to make it does not count as the peer's.
    """

    def __init__(self, translate: Callable[[Tensor, Tensor], R]) -> None:
        self._translate = translate
        self._of: tuple[Tensor, int, Tensor, int] | None = None
        self._kept: R | None = None

    def __call__(self, token_mask: Tensor, indices: Tensor) -> R:
        if token_mask.is_inference() or indices.is_inference():  # these have no version that shows a change
            return self._translate(token_mask, indices)
        if self._kept is None or not self._is_of(token_mask, indices):
            self._kept = self._translate(token_mask, indices)
            self._of = token_mask, token_mask._version, indices, indices._version
        return self._kept

    def _is_of(self, token_mask: Tensor, indices: Tensor) -> bool:
        if self._of is None:
            return False
        mask, mask_version, seen, seen_version = self._of
        unchanged = token_mask._version == mask_version and indices._version == seen_version
        return token_mask is mask and indices is seen and unchanged


def not_installed(library: str) -> Unsupported | None:
    """Return why a peer's library cannot be used, without importing it, or None where it is installed."""
    return Unsupported(catalog.missing(library)) if importlib.util.find_spec(library) is None else None
