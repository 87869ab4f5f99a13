"""Find and make token dispatchers by name."""

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed import ProcessGroup

from experts import catalog
from experts.config import BackendConfig, MoEConfig
from experts.dispatch import Dispatcher
from experts.errors import ConfigError, RegistryError, Unsupported

_MODULES = {dispatcher.name: dispatcher.module for dispatcher in catalog.DISPATCHERS}


def dispatcher_names() -> tuple[str, ...]:
    """Return the names of all dispatchers."""
    return tuple(_MODULES)


def dispatcher_options(name: str, backend: BackendConfig) -> dict[str, Any]:
    """Return the options of a dispatcher that the configuration sets.

    Raises ConfigError if the configuration sets an option of another dispatcher.
    """
    options = {}
    for option in dict.fromkeys(option for entry in catalog.DISPATCHERS for option in entry.options):
        value = getattr(backend, option)
        takers = [entry.name for entry in catalog.DISPATCHERS if option in entry.options]
        if value is not None and name not in takers:
            raise ConfigError(
                f"{option} = {value!r}: the dispatcher {name} does not take it; use {', '.join(takers)}, or leave "
                f"{option} out"
            )
        if value is not None:
            options[option] = value
    return options


def make_dispatcher(
    name: str, group: ProcessGroup, config: MoEConfig, options: Mapping[str, Any] | None = None
) -> Dispatcher:
    """Return the named dispatcher over a process group, with the options that `dispatcher_options` returns.

    Raises RegistryError for an unknown name, and Unsupported if the dispatcher cannot run over the group.
    """
    if name not in _MODULES:
        raise RegistryError(f"there is no dispatcher {name!r}; the dispatchers are {', '.join(_MODULES)}")
    made: Dispatcher = _module(name).make(group, config, **(options or {}))
    return made


def dispatcher_unsupported(name: str, device: torch.device, config: MoEConfig) -> Unsupported | None:
    """Return why a dispatcher cannot carry the config's tokens on a device, or None where it can.

    The dispatcher of one process, "local", can carry every config's tokens.
    """
    if name not in _MODULES:
        return None
    reason: Unsupported | None = _module(name).unsupported(device, config)
    return reason


def _module(name: str) -> Any:
    return importlib.import_module(_MODULES[name])


def destroy_buffers(name: str | None = None) -> None:
    """Free the buffers that dispatchers and peers keep for a process group, or only those of the named dispatcher.

    All ranks must call this function before they destroy their process group. It imports no dispatcher and no peer: one
    that was not imported has no buffers.
    """
    peers = [backend.target.partition(":")[0] for backend in catalog.BACKENDS if backend.target is not None]
    modules = dict.fromkeys([*_MODULES.values(), *peers]) if name is None else (_MODULES[name],)
    for module in filter(None, map(sys.modules.get, modules)):
        destroy = getattr(module, "destroy_buffers", None)
        if destroy is not None:
            destroy()
