"""Define the base class of the peers. A peer is an expert layer of another library with this package's interface."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from experts import catalog
from experts.config import MoEConfig
from experts.errors import Unsupported
from experts.state_dict import as_local

R = TypeVar("R")


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """Return [E, in, out] from [E, out, in], or the reverse, as a view."""
    return tensor.mT


@dataclass(frozen=True)
class Kept:
    """Where a peer keeps one of the stacked parameters.

    `name` is the name of the parameter in the other library's module. `to_peer` converts a tensor from the stacked
    layout to the other library's layout, and `to_stacked` converts a tensor back.
    """

    name: str
    to_peer: Callable[[Tensor], Tensor] = as_it_is
    to_stacked: Callable[[Tensor], Tensor] = as_it_is


class PeerExperts(nn.Module):
    """The module `peer` of another library.

    A peer runs on one process, unless it has `init_token_dispatcher`. `layout` maps the name of each stacked parameter
    to its place in `peer`. An optimizer trains the parameters of `peer`, which have the other library's layout. State
    dicts and `stacked_grads` have the stacked layout.
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
        """Return the gradients of this rank's experts, stacked. A parameter without a gradient has no entry."""
        grads = {name: getattr(self.peer, kept.name).grad for name, kept in self.layout.items()}
        return {name: self.layout[name].to_stacked(as_local(grad)) for name, grad in grads.items() if grad is not None}


def _stack_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(module, PeerExperts)
    for name, kept in module.layout.items():
        state_dict[prefix + name] = kept.to_stacked(state_dict.pop(f"{prefix}peer.{kept.name}"))


def _peer_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Replace stacked entries by entries in the other library's layout (a load hook).

    With `assign=True` the new entries are contiguous copies.
    """
    assert isinstance(module, PeerExperts)
    keeps = local_metadata.get("assign_to_params_buffers", False)
    for name, kept in module.layout.items():
        if prefix + name in state_dict:
            own = kept.to_peer(state_dict.pop(prefix + name))
            state_dict[f"{prefix}peer.{kept.name}"] = own.contiguous() if keeps else own


class Translated(Generic[R]):
    """A cache of the routing in the format that the other library's layer takes.

    A call converts the token mask and the indices with the function `translate`. A later call with the same tensors
    returns the same result, unless a tensor was changed in place. In the other library, a router makes the routing in
    this format. So the time of the conversion must not count as the time of the layer.
    """

    def __init__(self, translate: Callable[[Tensor, Tensor], R]) -> None:
        self._translate = translate
        self._of: tuple[Tensor, int, Tensor, int] | None = None
        self._kept: R | None = None

    def __call__(self, token_mask: Tensor, indices: Tensor) -> R:
        if token_mask.is_inference() or indices.is_inference():  # inference tensors have no version that shows a change
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
    """Return that a peer's library is not installed, or None where it is. Does not import the library."""
    return Unsupported(catalog.missing(library)) if importlib.util.find_spec(library) is None else None
