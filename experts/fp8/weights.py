"""Quantise the weights of a layer's experts to FP8, and keep them for the next calls."""

from typing import Protocol

from torch import Tensor

from experts.activations import activation_form
from experts.config import MoEConfig
from experts.fp8.blocks import Matrices


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


class FreshWeights:
    """Weights that are quantised each time that a product reads them. Nothing is kept."""

    def __init__(self, gate_and_up: Tensor, down: Tensor, config: MoEConfig) -> None:
        self._gate_and_up, self._down, self._halves = gate_and_up, down, up_halves(config)

    def up(self) -> Matrices:
        """As `Weights.up`."""
        return _quantise().quantise_weights(self._gate_and_up, self._halves)

    def down(self) -> Matrices:
        """As `Weights.down`."""
        return _quantise().quantise_weights(self._down, 1)

    def up_back(self) -> Matrices:
        """As `Weights.up_back`."""
        return _quantise().quantise_weights_back(self._gate_and_up, self._halves)

    def down_back(self) -> Matrices:
        """As `Weights.down_back`."""
        return _quantise().quantise_weights_back(self._down, 1)


class KeptWeights:
    """The weights of a `WeightCache`. Backward turns them around, and so it quantises nothing."""

    def __init__(self, up: Matrices, down: Matrices) -> None:
        self._up, self._down = up, down

    def up(self) -> Matrices:
        """As `Weights.up`."""
        return self._up

    def down(self) -> Matrices:
        """As `Weights.down`."""
        return self._down

    def up_back(self) -> Matrices:
        """As `Weights.up_back`."""
        return _quantise().transposed(self._up)

    def down_back(self) -> Matrices:
        """As `Weights.down_back`."""
        return _quantise().transposed(self._down)


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

    def weights(self, gate_and_up: Tensor, down: Tensor, config: MoEConfig) -> KeptWeights:
        """Return the weights [L, D, H] and [L, I, D] in FP8. If the cache is stale, quantise them now."""
        if self._kept is not None and not self._fits(gate_and_up, down):
            self.forget()
        if self.stale or self._kept is None:
            into = self._kept or (None, None)
            up = _quantise().quantise_weights(gate_and_up, up_halves(config), into[0])
            self._kept = up, _quantise().quantise_weights(down, 1, into[1])
            self.stale = False
        return KeptWeights(*self._kept)

    def _fits(self, gate_and_up: Tensor, down: Tensor) -> bool:
        assert self._kept is not None
        pairs = zip(self._kept, (gate_and_up, down), strict=True)
        return all(kept.values.shape == b.mT.shape and kept.values.device == b.device for kept, b in pairs)


def up_halves(config: MoEConfig) -> int:
    """Return 2 if the up projection has gate and up in halves, which have blocks of their own, else 1."""
    form = activation_form(config)
    return 2 if form.gated and not form.interleaved else 1


def _quantise():  # type: ignore[no-untyped-def]
    from experts.fp8 import quantise

    return quantise
