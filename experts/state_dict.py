"""Stacked parameters of all experts, and the share of one rank."""

from typing import overload

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor


@overload
def as_local(tensor: Tensor) -> Tensor: ...
@overload
def as_local(tensor: None) -> None: ...
def as_local(tensor: Tensor | None) -> Tensor | None:
    """This rank's part of a DTensor, with autograd; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_share(stacked: Tensor, ep_mesh: DeviceMesh) -> Tensor:
    """This rank's experts, a view, of a plain tensor of all experts."""
    count = stacked.shape[0] // ep_mesh.size()
    return stacked.narrow(0, ep_mesh.get_local_rank() * count, count)


def sharded_like(stacked: Tensor, parameter: DTensor) -> DTensor:
    """A plain tensor of all experts, alike on every rank, sharded as the parameter is: a copy on its mesh's device."""
    return distribute_tensor(stacked.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
