"""The token dispatchers by name."""

from collections.abc import Callable

import torch
from torch.distributed import ProcessGroup

from experts.config import MoEConfig
from experts.dispatch import Dispatcher
from experts.errors import RegistryError, Unsupported


def _allgather(group: ProcessGroup, config: MoEConfig) -> Dispatcher:
    from experts.dispatch.allgather import AllGather

    return AllGather(group)


def _alltoall(group: ProcessGroup, config: MoEConfig) -> Dispatcher:
    from experts.dispatch.alltoall import AllToAll

    return AllToAll(group, config.n_routed_experts // group.size())


def _deepep(group: ProcessGroup, config: MoEConfig) -> Dispatcher:
    from experts.dispatch.deepep import DeepEP

    return DeepEP(group, config)


_FACTORIES: dict[str, Callable[[ProcessGroup, MoEConfig], Dispatcher]] = {
    "allgather": _allgather,
    "alltoall": _alltoall,
    "deepep": _deepep,
}


def dispatcher_names() -> tuple[str, ...]:
    """Every dispatcher there is."""
    return tuple(_FACTORIES)


def make_dispatcher(name: str, group: ProcessGroup, config: MoEConfig) -> Dispatcher:
    """The dispatcher of that name over a process group. Raises RegistryError, Unsupported."""
    if name not in _FACTORIES:
        raise RegistryError(f"there is no dispatcher {name!r}; the dispatchers are {', '.join(_FACTORIES)}")
    return _FACTORIES[name](group, config)


def dispatcher_unsupported(name: str, device: torch.device, config: MoEConfig) -> Unsupported | None:
    """Why a dispatcher cannot carry the config's tokens on a device; "local", one process, always can."""
    if name == "deepep":
        from experts.dispatch import deepep

        return deepep.unsupported(device, config)
    return None
