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
    """The weights of a layer in FP8, from call to call.

    After a call without gradients, the cache keeps the layout of the forward pass. After a call with gradients, it
    keeps the layout of backward.

    `stale` is true if the next call must quantise the weights. Whoever changes the weights must set it. Weights that
    are quantised again overwrite the memory that is kept. Once a CUDA graph has captured a call, the cache keeps both
    layouts and frees nothing, so that the graph still finds them.
    """

    def __init__(self) -> None:
        self.stale = True
        self._up, self._down = _Kept(), _Kept()
        self._times_quantised = 0
        self._is_used_by_graph = self._was_captured = False

    @property
    def num_bytes(self) -> int:
        """The bytes that the cache holds."""
        return self._up.num_bytes + self._down.num_bytes

    def forget(self) -> None:
        """Free the memory. The next call quantises the weights."""
        self.stale, self._up, self._down = True, _Kept(), _Kept()

    def weights(
        self, gate_and_up: Tensor, down: Tensor, config: MoEConfig, *, back: bool, both: bool, padded: bool = False
    ) -> Weights:
        """Return the weights [L, D, H] and [L, I, D] in FP8. If the cache is stale, quantise them now.

        `back` is whether a backward pass follows. With `both`, the cache keeps both layouts from the first such call
        on. `padded` is that of `Weights`, and must be the same in every call.
        """
        from experts.fp8.weights import KeptWeights

        if not (self._up.fits(gate_and_up) and self._down.fits(down)):
            self.forget()
        captures = _is_captured(gate_and_up)
        if self._was_captured and not captures:
            self.stale = True  # the kernels of a captured call have not run
        self._was_captured = captures
        self._is_used_by_graph |= captures
        both = both or self._is_used_by_graph
        (up, up_back), (down_, down_back) = (
            kept.bring(b_LPQ, halves, self.stale, back, both, padded)
            for kept, b_LPQ, halves in ((self._up, gate_and_up, up_halves(config)), (self._down, down, 1))
        )
        self._times_quantised += self.stale
        self.stale, number = False, self._times_quantised
        backward = None if up_back is None or down_back is None else (up_back, down_back)
        width = gate_and_up.shape[2]
        return KeptWeights((up, down_), backward, width, padded, lambda: self._times_quantised == number)


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


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
        if stale:
            self._is_fresh = False, False
        if stale and not both:  # free first what this call does not keep
            self._forward, self._back = (None, self._back) if back else (self._forward, None)
        forward, backward = self._forward, self._back
        has_forward, has_back = self._is_fresh
        if not (has_forward or has_back) and (back or backward is not None):
            forward, backward = quantise_weights_both(b_LPQ, halves, forward, backward, padded)
            has_back = True
        elif not (has_forward or has_back):
            forward = quantise_weights(b_LPQ, halves, forward)
        elif not has_forward:
            assert backward is not None
            forward = transposed(backward, rows=b_LPQ.shape[2])
        assert forward is not None
        if back and not has_back:
            backward, has_back = transposed(forward, backward, padded), True
        self._forward = forward if both or not back else None
        self._back = backward if both or back else None
        self._is_fresh = self._forward is not None, has_back and self._back is not None
        return forward, backward if back else None
