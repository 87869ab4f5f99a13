"""Find and make token dispatchers by name."""

import importlib
import sys
from typing import Any

import torch
from torch.distributed import ProcessGroup

from experts import catalog
from experts.config import MoEConfig
from experts.dispatch import Dispatcher
from experts.errors import RegistryError, Unsupported

_MODULES = {dispatcher.name: dispatcher.module for dispatcher in catalog.DISPATCHERS}


def dispatcher_names() -> tuple[str, ...]:
    """Return the names of all dispatchers."""
    return tuple(_MODULES)


def make_dispatcher(name: str, group: ProcessGroup, config: MoEConfig) -> Dispatcher:
    """Return the named dispatcher over a process group.

    Raises RegistryError for an unknown name, and Unsupported if the dispatcher cannot run over the group.
    """
    if name not in _MODULES:
        raise RegistryError(f"there is no dispatcher {name!r}; the dispatchers are {', '.join(_MODULES)}")
    made: Dispatcher = _module(name).make(group, config)
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


def destroy_buffers() -> None:
    """Free the buffers that dispatchers keep for a process group.

    All ranks must call this function before they destroy their process group. It imports no dispatcher: one that was
    not imported has no buffers.
    """
    for module in filter(None, map(sys.modules.get, _MODULES.values())):
        destroy = getattr(module, "destroy_buffers", None)
        if destroy is not None:
            destroy()
