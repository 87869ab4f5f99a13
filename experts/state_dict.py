"""Convert between the stacked parameters of all experts and the parameters of one rank's experts.

Functions that make a DTensor import torch.distributed.tensor when they are called. The import takes more than a second
of CPU time (torch 2.13), and layers on one rank never need it.
"""

import sys
from typing import TYPE_CHECKING, TypeGuard, overload

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from experts.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Return whether the value is a DTensor. Before somebody imports torch.distributed.tensor there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


@overload
def as_local(tensor: Tensor) -> Tensor: ...
@overload
def as_local(tensor: None) -> None: ...
def as_local(tensor: Tensor | None) -> Tensor | None:
    """Return this rank's part of a DTensor, with autograd. Return a plain tensor or None unchanged."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def let_fsdp_shard(module: nn.Module) -> None:
    """Make FSDP shard the module's own parameters again if a forward has left them whole.

    FSDP does that when somebody asks for the state dict. It also does that in a load, but after the hooks of this
    package, which must know how the parameters will be sharded.
    """
    module.state_dict(keep_vars=True)


def local_share(stacked: Tensor, ep_mesh: DeviceMesh) -> Tensor:
    """Return a view [L, …] of the part of `stacked` that holds this rank's experts.

    `stacked` is a plain tensor [E, …] of all experts.
    """
    count = stacked.shape[0] // ep_mesh.size()
    return stacked.narrow(0, ep_mesh.get_local_rank() * count, count)


def sharded(local: Tensor, ep_mesh: DeviceMesh) -> "DTensor":
    """Return a DTensor of all ranks' experts, of which `local` [L, …] holds this rank's."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(local, ep_mesh, [Shard(0)], run_check=False)


def joined(*meshes: DeviceMesh) -> DeviceMesh:
    """Return the mesh whose dimensions are those of the given meshes, in this order.

    FSDP puts its own mesh before the mesh of a DTensor in the same way. Raises ConfigError unless the meshes are
    dimensions of one mesh, with names.
    """
    try:
        return DeviceMesh._concatenate([*meshes])
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"the meshes {' and '.join(map(str, meshes))} cannot be joined; take FSDP's mesh and the expert-parallel "
            'mesh from one init_device_mesh(…, mesh_dim_names=("dp", "ep"))'
        ) from error


def sharded_like(stacked: Tensor, parameter: "DTensor") -> "DTensor":
    """Return a copy of `stacked`, sharded like the parameter, on the device of the parameter's mesh.

    `stacked` is a plain tensor [E, …] of all experts. Every rank must pass the same tensor.
    """
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(stacked.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
