"""Keep the weights of a layer's experts in FP8 from call to call."""

from typing import Protocol

import torch
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

    def end_forward(self) -> None:
        """Say that a forward pass, which backward follows, has read its matrices."""


class WeightCache:
    """The weights of a layer in FP8, in the layout that the last call read last: that of the forward pass or backward.

    `stale` is true if the next call must quantise the weights. Whoever changes the weights must set it. Weights that
    are quantised again overwrite the memory that is kept. If a CUDA graph has captured a call that reads weights
    quantised before, nothing is freed from then on, so that the graph still finds them.
    """

    def __init__(self) -> None:
        self.stale = True
        self._up, self._down = _Kept(), _Kept()
        self._is_read_by_graph = False

    @property
    def num_bytes(self) -> int:
        """The bytes that the cache holds."""
        return self._up.num_bytes + self._down.num_bytes

    def forget(self) -> None:
        """Free the memory. The next call quantises the weights."""
        self.stale, self._up, self._down = True, _Kept(), _Kept()

    def weights(
        self, gate_and_up: Tensor, down: Tensor, config: MoEConfig, back: bool, both: bool, padded: bool = False
    ) -> Weights:
        """Return the weights [L, D, H] and [L, I, D] in FP8. If the cache is stale, quantise them now.

        `back` is whether a backward pass follows. With `both`, the cache keeps both layouts from the first such call
        on. `padded` is that of `Weights`, and must be the same in every call.
        """
        from experts.fp8.weights import KeptWeights

        if not (self._up.fits(gate_and_up) and self._down.fits(down)):
            self.forget()
        if gate_and_up.is_cuda and torch.cuda.is_current_stream_capturing() and not self.stale:
            self._is_read_by_graph = True
        both = both or self._is_read_by_graph
        (up, up_back), (down_, down_back) = (
            kept.bring(b_LPQ, halves, self.stale, back, both, padded)
            for kept, b_LPQ, halves in ((self._up, gate_and_up, up_halves(config)), (self._down, down, 1))
        )
        self.stale = False
        backward = None if up_back is None or down_back is None else (up_back, down_back)
        return KeptWeights((up, down_), backward, gate_and_up.shape[2], padded)


class _Kept:
    """One of the two projections in FP8, in the layouts that are kept."""

    def __init__(self) -> None:
        self._of: tuple[torch.Size, torch.device] | None = None
        self._forward: Matrices | None = None
        self._back: Matrices | None = None
        #: Whether each layout has the values of the last quantisation. If not, only its memory is kept.
        self._is_fresh = False, False

    @property
    def num_bytes(self) -> int:
        return sum(matrices.num_bytes for matrices in (self._forward, self._back) if matrices is not None)

    def fits(self, b_LPQ: Tensor) -> bool:
        """Return whether nothing is kept, or weights of this shape and device."""
        return self._of in (None, (b_LPQ.shape, b_LPQ.device))

    def bring(
        self, b_LPQ: Tensor, halves: int, stale: bool, back: bool, both: bool, padded: bool
    ) -> tuple[Matrices, Matrices | None]:
        """Return weights [L, P, Q] in the layout of the forward pass and, with `back`, in that of backward.

        With `both`, keep what there is. Otherwise keep the one that is needed last.
        """
        from experts.fp8.quantise import quantise_weights, quantise_weights_both, transposed

        self._of = b_LPQ.shape, b_LPQ.device
        forward, backward = self._forward, self._back
        has_forward, has_back = (not stale and fresh for fresh in self._is_fresh)
        if back and not (has_forward or has_back):
            forward, backward = quantise_weights_both(b_LPQ, halves, forward, backward, padded)
            has_back = True
        elif has_back and not has_forward:
            assert backward is not None
            forward = transposed(backward, forward, rows=b_LPQ.shape[2])
        elif not has_forward:
            forward = quantise_weights(b_LPQ, halves, forward)
        assert forward is not None
        if back and not has_back:
            backward, has_back = transposed(forward, backward, padded), True
        self._forward = forward if both or not back else None
        self._back = backward if both or back else None
        self._is_fresh = self._forward is not None, has_back and self._back is not None
        return forward, backward if back else None
