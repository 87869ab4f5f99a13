"""Define what a compute engine is. An engine computes the local experts of one rank, and each engine is one file.

The file of an engine holds its `Engine` as `ENGINE`.
"""

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
    """The stacked parameters of L experts. The parameters of a single expert do not have the dimension L."""

    gate_and_up_projs: Tensor  # [L, D, 2I], ungated [L, D, I]
    down_projs: Tensor  # [L, I, D]
    gate_up_proj_bias: Tensor | None  # [L, 2I], ungated [L, I]
    down_proj_bias: Tensor | None  # [L, D]

    def to(self, dtype: torch.dtype) -> "ExpertParameters":
        """Return the parameters in another dtype."""
        return ExpertParameters(*(None if tensor is None else tensor.to(dtype) for tensor in self))  # type: ignore[arg-type]


PARAMETER_NAMES = ExpertParameters._fields


class Adapters(NamedTuple):
    """The low-rank adapters (LoRA) of L experts, of rank R. The adapters of one expert do not have the dimension L.

    With adapters, a projection multiplies by weight + scale · A @ B. The sum is not computed: rows x give
    x @ weight + (scale · x @ A) @ B.
    """

    scale: float
    gate_and_up_A: Tensor  # [L, D, R]
    gate_and_up_B: Tensor  # [L, R, 2I], ungated [L, R, I]
    down_A: Tensor  # [L, I, R]
    down_B: Tensor  # [L, R, D]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four matrices, without the scale."""
        return self[1:]

    def to(self, dtype: torch.dtype) -> "Adapters":
        """Return the adapters in another dtype."""
        return Adapters(self.scale, *(tensor.to(dtype) for tensor in self.tensors))


class MainGrads(NamedTuple):
    """Functions that return the main gradients of the weights, to which backward adds in float32.

    Backward calls a function if it computes the weight's gradient. The function returns a contiguous float32 tensor of
    the weight's shape. It is None for a weight that requires no gradient.
    """

    gate_and_up_projs: Callable[[], Tensor] | None
    down_projs: Callable[[], Tensor] | None


#: (x [T, D], weights [T, K], indices [T, K], parameters, config, first local expert) -> [T, D] in x's dtype: for each
#: token, the weighted sum of the outputs of the local experts that the token chose. Choices of other ranks' experts and
#: of −1 contribute nothing. An engine with `saves` also takes `save=`, the value of `BackendConfig.save`. An engine
#: with `adapts` also takes `adapters=`, the adapters of the local experts; the parameters then get no gradients. An
#: engine with `fp8` also takes `cache=`, an `experts.fp8.cache.WeightCache`. With `fp8_formats`, it also takes the
#: values of `fp8_gradients` and `fp8_weight_gradients` of `BackendConfig`. An engine with `accumulates` also takes
#: `main_grads=`, a `MainGrads`; backward then returns no gradient of a weight, but adds it there.
Compute = Callable[..., Tensor]


@dataclass(frozen=True)
class Engine:
    """One way to compute the local experts.

    `compute` is the function that computes the local experts; see `Compute`.

    `unsupported(device, config)` returns why the engine cannot run the config on the device, or None where it can. If
    `config` is None, it returns why the engine cannot run any config on the device.

    `saves` is true if the caller can choose what the engine keeps for backward.

    `adapts` is true if the engine computes experts with low-rank adapters.

    `fp8` is true if the engine quantises the weights to FP8, so that the layer can keep them from call to call.

    `fp8_formats` is true if the caller can choose what is in FP8: the format of gradients of rows, whether the products
    for the gradients of the weights are in FP8, and whether tokens come in FP8 from other ranks.

    `accumulates` is true if backward can add the gradients of the weights to main gradients.

    `products` takes rows sorted by expert (a `Permutation`) and returns a library's grouped matrix products over these
    rows. moebench compares the engine's time with the time of these products. `products` is None if moebench has
    nothing to compare the engine's time with.

    `own_products(permutation, config)` returns the products with which `compute` calls `whole_experts`, on rows sorted
    by expert. It is None if `compute` does anything else. Under torch.compile, an engine with `own_products` keeps for
    backward what it keeps without; another engine computes forward again in backward (`experts.compiled`).
    """

    compute: Compute
    unsupported: Callable[[torch.device, MoEConfig | None], Unsupported | None]
    saves: bool = False
    adapts: bool = False
    fp8: bool = False
    fp8_formats: bool = False
    accumulates: bool = False
    products: "Callable[[Permutation], Products] | None" = None
    own_products: "Callable[[Permutation, MoEConfig], Products] | None" = None
