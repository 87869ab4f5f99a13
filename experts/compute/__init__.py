"""The compute engines, one per file. Each file has an `ENGINE`, which computes the local experts of one rank."""

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
    """The stacked parameters of L experts. The dimension L is absent in the parameters of a single expert."""

    gate_and_up_projs: Tensor  # [L, D, 2I], ungated [L, D, I]
    down_projs: Tensor  # [L, I, D]
    gate_up_proj_bias: Tensor | None  # [L, 2I], ungated [L, I]
    down_proj_bias: Tensor | None  # [L, D]

    def to(self, dtype: torch.dtype) -> "ExpertParameters":
        """Return the parameters in another dtype."""
        return ExpertParameters(*(None if tensor is None else tensor.to(dtype) for tensor in self))  # type: ignore[arg-type]


PARAMETER_NAMES = ExpertParameters._fields

#: (x [T, D], weights [T, K], indices [T, K], parameters, config, first local expert) -> [T, D] in x's dtype: for each
#: token, the sum over its choices of local experts. Other indices, including −1, contribute nothing. An engine with
#: `saves` also takes `save=`, the value of `BackendConfig.save`.
Compute = Callable[..., Tensor]


@dataclass(frozen=True)
class Engine:
    """One way to compute the local experts.

    `unsupported(device, config)` returns why the engine cannot run on the device with activations of the config's
    dtype; without a config it answers for the device only. `saves`: the caller can choose what the engine keeps for
    backward. `products` returns a library's grouped products over rows sorted by expert, which the engine's time is
    compared with; it is None for an engine without such products.
    """

    compute: Compute
    unsupported: Callable[[torch.device, MoEConfig | None], Unsupported | None]
    saves: bool = False
    products: "Callable[[Permutation], Products] | None" = None
