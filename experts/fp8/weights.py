"""Quantise the weights of a layer's experts to FP8, in the layouts that the forward pass and backward read."""

from torch import Tensor

from experts.config import MoEConfig
from experts.fp8.blocks import Matrices, up_halves
from experts.fp8.quantise import quantise_weights, quantise_weights_back, transposed


class FreshWeights:
    """Weights that are quantised each time that a product reads them. Nothing is kept."""

    def __init__(self, gate_and_up: Tensor, down: Tensor, config: MoEConfig, padded: bool = False) -> None:
        self._gate_and_up, self._down, self._halves = gate_and_up, down, up_halves(config)
        self.padded = padded

    def up(self) -> Matrices:
        """As `experts.fp8.cache.Weights.up`."""
        return quantise_weights(self._gate_and_up, self._halves)

    def down(self) -> Matrices:
        """As `experts.fp8.cache.Weights.down`."""
        return quantise_weights(self._down, 1)

    def up_back(self) -> Matrices:
        """As `experts.fp8.cache.Weights.up_back`."""
        return quantise_weights_back(self._gate_and_up, self._halves, self.padded)

    def down_back(self) -> Matrices:
        """As `experts.fp8.cache.Weights.down_back`."""
        return quantise_weights_back(self._down, 1)


class KeptWeights:
    """The weights of a `WeightCache`. If it does not keep them in the layout of backward, each call transposes them."""

    def __init__(
        self, up: Matrices, down: Matrices, up_back: Matrices | None, down_back: Matrices | None, padded: bool
    ) -> None:
        self._up, self._down, self._up_back, self._down_back = up, down, up_back, down_back
        self.padded = padded

    def up(self) -> Matrices:
        """As `experts.fp8.cache.Weights.up`."""
        return self._up

    def down(self) -> Matrices:
        """As `experts.fp8.cache.Weights.down`."""
        return self._down

    def up_back(self) -> Matrices:
        """As `experts.fp8.cache.Weights.up_back`."""
        return transposed(self._up, padded=self.padded) if self._up_back is None else self._up_back

    def down_back(self) -> Matrices:
        """As `experts.fp8.cache.Weights.down_back`."""
        return transposed(self._down) if self._down_back is None else self._down_back
