"""Compute engines, one a file: each an `Engine`, a function for the local experts of one rank, and why it may not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from experts.config import MoEConfig
from experts.errors import Unsupported

if TYPE_CHECKING:
    from experts.compute.whole import Products
    from experts.permutation import Permutation


class ExpertParameters(NamedTuple):
    """Parameters of L experts, stacked; L is absent where the parameters are those of one expert."""

    gate_and_up_projs: Tensor  # [L, D, 2I], ungated [L, D, I]
    down_projs: Tensor  # [L, I, D]
    gate_up_proj_bias: Tensor | None  # [L, 2I], ungated [L, I]
    down_proj_bias: Tensor | None  # [L, D]

    def to(self, dtype: torch.dtype) -> "ExpertParameters":
        """In another dtype."""
        return ExpertParameters(*(None if tensor is None else tensor.to(dtype) for tensor in self))  # type: ignore[arg-type]


PARAMETER_NAMES = ExpertParameters._fields

#: (x [T, D], weights [T, K], indices [T, K], parameters, config, first local expert) -> [T, D] in x's dtype: the sum
#: over the choices of local experts. Indices outside of the window, −1 among them, contribute nothing. An engine that
#: `saves` takes `save=` too, of BackendConfig.
Compute = Callable[..., Tensor]


@dataclass(frozen=True)
class Engine:
    """One way to compute the local experts.

    `unsupported(device, config)` says why the engine cannot run there on activations of the config's dtype; without a
    config it speaks of the device alone. `saves`: what is kept for backward can be chosen. `products`: the grouped
    products of a library, over rows sorted by expert, that the engine's time is set against; None where there are none.
    """

    compute: Compute
    unsupported: Callable[[torch.device, MoEConfig | None], Unsupported | None]
    saves: bool = False
    products: "Callable[[Permutation], Products] | None" = None
