"""Quantise the weights of a layer's experts to FP8, in the layouts that the forward pass and backward read."""

from collections.abc import Callable

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

    def end_forward(self) -> None:
        """As `experts.fp8.cache.Weights.end_forward`. There is nothing to free."""


class KeptWeights:
    """The weights that a `WeightCache` has brought for one call: `forward` and, if backward follows, `back`.

    Each is the up projection, whose H is `width`, and the down projection. A forward pass that is computed once more
    after its end transposes the layout of backward. `unchanged` tells whether the cache has quantised no other weights
    since, which would have overwritten these.
    """

    def __init__(
        self,
        forward: tuple[Matrices, Matrices],
        back: tuple[Matrices, Matrices] | None,
        width: int,
        padded: bool,
        unchanged: Callable[[], bool],
    ) -> None:
        self._forward: tuple[Matrices, Matrices] | None = forward
        self._back, self._width, self._unchanged = back, width, unchanged
        self.padded = padded

    def up(self) -> Matrices:
        """As `experts.fp8.cache.Weights.up`."""
        return transposed(self.up_back(), rows=self._width) if self._forward is None else self._forward[0]

    def down(self) -> Matrices:
        """As `experts.fp8.cache.Weights.down`."""
        return transposed(self.down_back()) if self._forward is None else self._forward[1]

    def up_back(self) -> Matrices:
        """As `experts.fp8.cache.Weights.up_back`."""
        return self._of_backward()[0]

    def down_back(self) -> Matrices:
        """As `experts.fp8.cache.Weights.down_back`."""
        return self._of_backward()[1]

    def _of_backward(self) -> tuple[Matrices, Matrices]:
        if not self._unchanged():
            raise RuntimeError(
                "the layer has quantised its weights again since this forward pass; run backward before the next call "
                "that follows weights_changed()"
            )
        assert self._back is not None
        return self._back

    def end_forward(self) -> None:
        """As `experts.fp8.cache.Weights.end_forward`. Frees the layout of the forward pass, if the cache does not."""
        self._forward = None
