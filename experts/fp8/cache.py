"""Keep the weights of a layer's experts in FP8 from call to call."""

from typing import Protocol

from torch import Tensor

from experts.config import MoEConfig
from experts.fp8.blocks import Matrices, up_halves


class Weights(Protocol):
    """The weights of the experts in FP8. The forward pass and backward read each matrix along another dimension."""

    def up(self) -> Matrices:
        """Return the up projection [L, H, D], for rows [N, D]."""

    def down(self) -> Matrices:
        """Return the down projection [L, D, I], for rows [N, I]."""

    def up_back(self) -> Matrices:
        """Return the up projection [L, D, H], for gradients [N, H]. The matrices are new."""

    def down_back(self) -> Matrices:
        """Return the down projection [L, I, D], for gradients [N, D]. The matrices are new."""


class WeightCache:
    """The weights of a layer in FP8, in the layout of the forward pass.

    `stale` is true if the next call must quantise the weights. Whoever changes the weights must set it. The memory is
    allocated once. Weights that are quantised again overwrite it, so that a captured CUDA graph still finds them.
    """

    def __init__(self) -> None:
        self.stale = True
        self._kept: tuple[Matrices, Matrices] | None = None

    @property
    def num_bytes(self) -> int:
        """The bytes that the cache holds."""
        return 0 if self._kept is None else sum(matrices.num_bytes for matrices in self._kept)

    def forget(self) -> None:
        """Free the memory. The next call quantises the weights."""
        self.stale, self._kept = True, None

    def weights(self, gate_and_up: Tensor, down: Tensor, config: MoEConfig) -> Weights:
        """Return the weights [L, D, H] and [L, I, D] in FP8. If the cache is stale, quantise them now."""
        from experts.fp8.quantise import quantise_weights
        from experts.fp8.weights import KeptWeights

        if self._kept is not None and not self._fits(gate_and_up, down):
            self.forget()
        if self.stale or self._kept is None:
            into = self._kept or (None, None)
            up = quantise_weights(gate_and_up, up_halves(config), into[0])
            self._kept = up, quantise_weights(down, 1, into[1])
            self.stale = False
        return KeptWeights(*self._kept)

    def _fits(self, gate_and_up: Tensor, down: Tensor) -> bool:
        assert self._kept is not None
        pairs = zip(self._kept, (gate_and_up, down), strict=True)
        return all(kept.values.shape == b.mT.shape and kept.values.device == b.device for kept, b in pairs)
