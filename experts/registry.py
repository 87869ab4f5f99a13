"""Backends by name: where each is, why it cannot run here, and those of other people.

A backend is a callable `(config: MoEConfig) -> nn.Module` whose module has the interface of `experts.GroupedExperts`:
its forward, and its parameters in the stacked layout. It may have an attribute `unsupported(device, config) -> str |
Unsupported | None` that says why it cannot run there (config None: on that device at all). Other people's are found
by entry point (group "experts.backends") or by `module:attribute`; they are imported when named, never before.
"""

import difflib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch
from torch import nn

from experts.config import BackendConfig, MoEConfig
from experts.engines import engine_names, get_engine
from experts.errors import RegistryError, Unsupported
from experts.modules import GroupedExperts

ENTRY_POINT_GROUP = "experts.backends"


@dataclass(frozen=True)
class Backend:
    """A named way to build an expert layer, and to ask whether it can run."""

    name: str
    build: Callable[[MoEConfig], nn.Module]
    _unsupported: Callable[[torch.device, MoEConfig | None], str | Unsupported | None]

    def unsupported(self, device: torch.device, config: MoEConfig | None = None) -> Unsupported | None:
        """Why this backend cannot run `config` on `device`; without a config, whether it can run there at all."""
        reason = self._unsupported(device, config)
        return Unsupported(reason) if isinstance(reason, str) else reason


def backend_names() -> tuple[str, ...]:
    """Built-in backends, then installed third-party ones. Imports none of them."""
    installed = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    return *engine_names(), *sorted(installed - set(engine_names()))


def get_backend(name: str) -> Backend:
    """The backend of that name: built in, an installed entry point, or `module:attribute`.

    Raises RegistryError, with the names there are, for one that leads nowhere.
    """
    if name in engine_names():
        engine = get_engine(name)
        build = functools.partial(GroupedExperts, backend=BackendConfig(experts=name))  # type: ignore[arg-type]
        return Backend(name, build, engine.unsupported)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            return _third_party(name, point.value)
    if ":" in name:
        return _third_party(name, name)
    near = difflib.get_close_matches(name, backend_names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RegistryError(
        f"there is no backend {name!r}; {hint}the backends are {', '.join(backend_names())}, or give module:attribute"
    )


def _third_party(name: str, target: str) -> Backend:
    module_name, _, attribute = target.partition(":")
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RegistryError(f"backend {name!r}: cannot import {target!r}: {error}; is it on PYTHONPATH?") from error
    if not callable(build):
        raise RegistryError(f"backend {name!r}: {target!r} is not callable; it must take a MoEConfig and give a module")
    return Backend(name, build, getattr(build, "unsupported", _runs_anywhere))


def _runs_anywhere(device: torch.device, config: MoEConfig | None) -> None:
    return None
