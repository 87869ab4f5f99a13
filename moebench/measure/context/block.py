"""Put the experts of a case into a block, which is then called like a layer of experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from experts import Unsupported
from moebench.parity.block import Around
from moebench.parity.passes import stacked_grads
from moebench.workload import driven
from moebench.workload.inputs import moe_config


class BlockLayer(nn.Module):
    """A block with the call of a layer of experts. The block routes its tokens itself and reads no given routing."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return the block's output [T, D]."""
        output: Tensor = self.block(x, token_mask)
        return output

    @property
    def experts(self) -> Any:
        """The layer of the routed experts."""
        return self.block.experts

    @property
    def dispatcher(self) -> Any:
        """The dispatcher of the routed experts; None if they have none."""
        return getattr(self.experts, "dispatcher", None)

    @dispatcher.setter
    def dispatcher(self, dispatcher: Any) -> None:
        self.experts.dispatcher = dispatcher

    def stacked_grads(self) -> dict[str, Tensor]:
        """Return the gradients of this rank's experts, stacked, and those of router and shared experts."""
        return stacked_grads(self.experts) | self.around_grads()

    def around_grads(self) -> dict[str, Tensor]:
        """Return the gradients of router and shared experts."""
        own = self.block.named_parameters()
        return {name: p.grad for name, p in own if not name.startswith("experts.") and p.grad is not None}


def block_config(fields: Mapping[str, Any]) -> Any:
    """Return the `BlockConfig` of a block with these fields of `moebench.workload.models.BLOCKS`."""
    of_block = {field.name for field in dataclasses.fields(driven.BlockConfig)}
    own = {name: value for name, value in fields.items() if name in of_block}
    router = {name: value for name, value in fields.items() if name not in of_block}
    return driven.BlockConfig(router=driven.RouterConfig(**router), **own)


def in_block(experts: nn.Module, around: Around, device: torch.device) -> BlockLayer:
    """Return a block of these experts, with the parameters of `around`.

    Raises Unsupported if the revision of `experts` has no blocks.
    """
    try:
        config = block_config(around.fields)
    except ImportError as error:
        raise Unsupported(f"this revision of experts has no block: {error}") from error
    with device:
        made = driven.MoEBlock(moe_config(around.case), config, nn.Identity())
    bias = {} if around.bias_E is None else {"router.e_score_correction_bias": around.bias_E}
    made.load_state_dict({**around.parameters, **bias})
    made.experts = experts
    return BlockLayer(made)
