"""Shard a layer with FSDP over data-parallel ranks, and gather its gradients."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from experts import Unsupported
from moebench.measure.context.block import BlockLayer
from moebench.parity.passes import stacked_grads
from moebench.workload.ranks import Ranks, is_dtensor


def fully_sharded(layer: nn.Module, ranks: Ranks, dtype: torch.dtype, main_dtype: torch.dtype) -> nn.Module:
    """Return the layer with its parameters sharded over the data-parallel ranks.

    Gradients are sums over these ranks, and not means, which FSDP takes by default: the gradient of the output has the
    scale of all tokens already. If `main_dtype` is wider than `dtype`, the shards and their gradients are in
    `main_dtype`, and the layer computes in `dtype`. Parameters are sharded again after forward, as in a model of many
    layers. All ranks hold the same router and shared experts, so those of a block are sharded over all ranks.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert ranks.dp_mesh is not None
    policy = MixedPrecisionPolicy()
    if main_dtype is not dtype:
        layer.to(main_dtype)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=main_dtype, cast_forward_inputs=False)
    parts = [(layer, ranks.dp_mesh)]
    if isinstance(layer, BlockLayer):
        parts = [(layer.experts, ranks.dp_mesh), (layer, init_device_mesh(ranks.dp_mesh.device_type, (ranks.size,)))]
    for part, mesh in parts:
        sharded = fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that multiplies
    return layer


def unsharded_grads(layer: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Return the stacked gradients of this rank's experts, gathered from the data-parallel ranks.

    A block also has those of its router and shared experts, gathered from all ranks.
    """
    if isinstance(layer, BlockLayer):
        around: Any = layer.around_grads()
        whole = {name: grad.full_tensor() for name, grad in around.items()}
        return unsharded_grads(layer.experts, ranks) | whole
    local = stacked_grads(layer)
    found = {}
    for name, entry in layer.state_dict().items():
        if not is_dtensor(entry):
            raise Unsupported(
                f"fsdp2: the state dict of {type(layer).__name__} does not show how FSDP has sharded {name}"
            )
        if name in local:
            over_dp: Any = entry.placements[0]  # FSDP's mesh comes before the expert-parallel mesh
            dim = over_dp.dim
            found[name] = ranks.unsharded(local[name].movedim(dim, 0)).movedim(0, dim)
    return found
