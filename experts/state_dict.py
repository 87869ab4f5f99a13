"""Convert between the stacked parameters of all experts and the parameters of one rank's experts."""

from typing import overload

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor


@overload
def as_local(tensor: Tensor) -> Tensor: ...
@overload
def as_local(tensor: None) -> None: ...
def as_local(tensor: Tensor | None) -> Tensor | None:
    """Return this rank's part of a DTensor, with autograd. Return a plain tensor or None unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_share(stacked: Tensor, ep_mesh: DeviceMesh) -> Tensor:
    """Return a view [L, …] of the part of `stacked` that holds this rank's experts.

    `stacked` is a plain tensor [E, …] of all experts.
    """
    count = stacked.shape[0] // ep_mesh.size()
    return stacked.narrow(0, ep_mesh.get_local_rank() * count, count)


def sharded_like(stacked: Tensor, parameter: DTensor) -> DTensor:
    """Return a copy of `stacked`, sharded like the parameter, on the device of the parameter's mesh.

    `stacked` is a plain tensor [E, …] of all experts. Every rank must pass the same tensor.
    """
    return distribute_tensor(stacked.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
