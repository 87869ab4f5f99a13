"""Keep the weights of a layer's experts in FP8 from call to call."""

from typing import Protocol

from torch import Tensor

from experts.config import MoEConfig
from experts.fp8.blocks import Matrices, up_halves


class Weights(Protocol):
    """The weights of the experts in FP8. The forward pass and backward read each matrix along another dimension.

    With `padded`, zeros fill up the halves of H in `up_back` (`experts.fp8.blocks.stored_width`).
    """

    padded: bool

    def up(self) -> Matrices:
        """Return the up projection [L, H, D], for rows [N, D]."""

    def down(self) -> Matrices:
        """Return the down projection [L, D, I], for rows [N, I]."""

    def up_back(self) -> Matrices:
        """Return the up projection [L, D, H], for gradients [N, H]."""

    def down_back(self) -> Matrices:
        """Return the down projection [L, I, D], for gradients [N, D]."""


class WeightCache:
    """The weights of a layer in FP8, in the layout of the forward pass, and in that of backward if one was asked for.

    `stale` is true if the next call must quantise the weights. Whoever changes the weights must set it. The memory of
    each layout is allocated once. Weights that are quantised again overwrite it, so that a captured CUDA graph still
    finds them.
    """

    def __init__(self) -> None:
        self.stale = True
        self._up, self._down = _Kept(), _Kept()

    @property
    def num_bytes(self) -> int:
        """The bytes that the cache holds."""
        return self._up.num_bytes + self._down.num_bytes

    def forget(self) -> None:
        """Free the memory. The next call quantises the weights."""
        self.stale, self._up, self._down = True, _Kept(), _Kept()

    def weights(
        self, gate_and_up: Tensor, down: Tensor, config: MoEConfig, back: bool, padded: bool = False
    ) -> Weights:
        """Return the weights [L, D, H] and [L, I, D] in FP8. If the cache is stale, quantise them now.

        `back` is whether the cache also keeps them in the layout of backward. If not, backward transposes them.
        `padded` is that of `Weights`, and must be the same in every call.
        """
        from experts.fp8.weights import KeptWeights

        if not (self._up.fits(gate_and_up) and self._down.fits(down)):
            self.forget()
        self._up.bring(gate_and_up, up_halves(config), self.stale, back, padded)
        self._down.bring(down, 1, self.stale, back, padded)
        self.stale = False
        assert self._up.forward is not None
        assert self._down.forward is not None
        backward = (self._up.back, self._down.back) if back else (None, None)
        return KeptWeights(self._up.forward, self._down.forward, *backward, padded)


class _Kept:
    """One of the two projections in FP8."""

    def __init__(self) -> None:
        self.forward: Matrices | None = None
        self.back: Matrices | None = None
        self._back_is_stale = True

    @property
    def num_bytes(self) -> int:
        return sum(matrices.num_bytes for matrices in (self.forward, self.back) if matrices is not None)

    def fits(self, b_LPQ: Tensor) -> bool:
        """Return whether nothing is kept, or weights of this shape and device."""
        kept = None if self.forward is None else self.forward.values
        return kept is None or (kept.shape == b_LPQ.mT.shape and kept.device == b_LPQ.device)

    def bring(self, b_LPQ: Tensor, halves: int, stale: bool, back: bool, padded: bool) -> None:
        """Quantise weights [L, P, Q] if they are stale, and make the layout of backward if it is needed."""
        from experts.fp8.quantise import quantise_weights, quantise_weights_both, transposed

        if stale and back:
            self.forward, self.back = quantise_weights_both(b_LPQ, halves, self.forward, self.back, padded)
        elif stale:
            self.forward = quantise_weights(b_LPQ, halves, self.forward)
        elif back and self._back_is_stale:
            assert self.forward is not None
            self.back = transposed(self.forward, self.back, padded)
        self._back_is_stale = not back and (stale or self._back_is_stale)
