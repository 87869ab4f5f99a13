"""Provide backends with a fault in the order, in the factors or in the gradients of the rows; see faulty."""

from collections.abc import Callable

import torch
from torch import Tensor

from experts import GroupedExperts


def first_active(indices_TK: Tensor, mask_T: Tensor) -> Tensor:
    """Return [T] bool, which is True only for the first active token."""
    return mask_T & (mask_T.cumsum(0) == 1)


def with_grad(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the same tensor. In backward, `change` replaces the tensor's gradient."""
    if not tensor.requires_grad:
        return tensor
    same = tensor.view_as(tensor)
    same.register_hook(change)
    return same


class WrongExpertOfOneInTenThousand(GroupedExperts):
    """Token 9,999 goes to the next expert."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        is_it_T1 = (torch.arange(len(x)) == 9_999).unsqueeze(-1)
        wrong = torch.where(is_it_T1 & (indices >= 0), (indices + 1) % self.n_routed_experts, indices)
        return super().forward(x, token_mask, weights, wrong)


class OffsetsOf16Bits(GroupedExperts):
    """Offsets of elements wrap at 2^16. Rows past this offset are read from the beginning of x."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        limit = 2**16 // x.shape[1]
        rows_T = torch.arange(len(x))
        wrapped_T = torch.where(token_mask & token_mask[rows_T % limit], rows_T % limit, rows_T)
        return super().forward(x[wrapped_T], token_mask, weights, indices)


class MinusOneIsTheLastExpert(GroupedExperts):
    """An index of −1 counts from the end, as in Python, and selects the last expert."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return super().forward(x, token_mask, weights, indices.long() % self.n_routed_experts)


class MinusOneEndsAToken(GroupedExperts):
    """The choices of a token after an index of −1 are ignored."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        ended = (indices < 0).cumsum(dim=1) > 0
        return super().forward(x, token_mask, weights, indices.masked_fill(ended, -1))


class DuplicateCountsOnce(GroupedExperts):
    """An expert that a token chooses twice gets only the first of the two weights, as from a set or a bitmap."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        earlier_KK = torch.ones(indices.shape[1], indices.shape[1], dtype=torch.bool).tril(-1)
        again = ((indices.unsqueeze(2) == indices.unsqueeze(1)) & earlier_KK).any(dim=2)
        return super().forward(x, token_mask, weights, indices.masked_fill(again, -1))


class RenormalisedWeights(GroupedExperts):
    """Routing weights are scaled to sum to one. The weights of a softmax over the chosen experts already sum to one."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return super().forward(x, token_mask, weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6), indices)


class WeightGradByDivision(GroupedExperts):
    """A routing weight's gradient comes from the weighted row, divided by the weight. For a zero weight it is lost."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        kept = with_grad(weights, lambda grad: torch.where(weights == 0, 0.0, grad))
        return super().forward(x, token_mask, kept, indices)


class WeightTwiceAfterDown(GroupedExperts):
    """With apply_router_weight_after_down, the weight multiplies both before and after the down projection."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        after = self.config.apply_router_weight_after_down
        return super().forward(x, token_mask, weights.square() if after else weights, indices)


class PartialTileLeftOut(GroupedExperts):
    """The busiest expert does not compute its rows past its last full tile of 16 rows."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        active = indices.masked_fill(~token_mask.unsqueeze(-1), -1).flatten()
        expert = int((active.long() + 1).bincount(minlength=2)[1:].argmax())
        rows_N = (active == expert).nonzero().flatten()
        left_out = torch.zeros_like(active, dtype=torch.bool)
        left_out[rows_N[len(rows_N) // 16 * 16 :]] = len(rows_N) > 16
        return super().forward(x, token_mask, weights, indices.masked_fill(left_out.view_as(indices), -1))


class TwoRowsExchanged(GroupedExperts):
    """The output rows of two neighbouring tokens are exchanged."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        right = super().forward(x, token_mask, weights, indices)
        active_N = token_mask.nonzero().flatten()
        if len(active_N) < 2:
            return right
        order_T = torch.arange(len(x))
        order_T[active_N[:2]] = active_N[:2].flip(0)
        return right[order_T]


class MaskedTokensLearn(GroupedExperts):
    """The output of masked tokens is zero, but the gradient of masked tokens is not zero."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        masked_T1 = ~token_mask.unsqueeze(-1)
        learning = with_grad(x, lambda grad: torch.where(masked_T1, torch.ones_like(grad), grad))
        return super().forward(learning, token_mask, weights, indices)


class UnwrittenGradOfMaskedTokens(GroupedExperts):
    """The rows of x's gradient for masked tokens are never written. The rows hold what was in the memory before."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        written_T1 = token_mask.unsqueeze(-1)
        partly = with_grad(x, lambda grad: torch.where(written_T1, grad, torch.empty_like(grad)))
        return super().forward(partly, token_mask, weights, indices)


class StaleInputGrad(GroupedExperts):
    """The gradient of x is computed in the first backward pass, and returned again while the shape is the same."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return super().forward(with_grad(x, self._kept), token_mask, weights, indices)

    def _kept(self, grad: Tensor) -> Tensor:
        before = getattr(self, "_first_grad", None)
        self._first_grad = grad if before is None or before.shape != grad.shape else before
        return self._first_grad.clone()


class StalePermutation(GroupedExperts):
    """The order of the rows is computed in the first call, and reused while the number of tokens is the same."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        before = getattr(self, "_indices", None)
        self._indices = indices.clone() if before is None or before.shape != indices.shape else before
        return super().forward(x, token_mask, weights, self._indices)


class WrongNowAndThen(GroupedExperts):
    """A race: in every seventh call, one token loses its last choice."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        self._num_calls = getattr(self, "_num_calls", 0) + 1
        lost = torch.zeros_like(indices, dtype=torch.bool)
        lost[:, -1] = first_active(indices, token_mask) & (self._num_calls % 7 == 0)
        return super().forward(x, token_mask, weights, indices.masked_fill(lost, -1))


class RowsAssumedContiguous(GroupedExperts):
    """x is read as if its rows were contiguous in memory."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        read = torch.as_strided(x.detach(), x.shape, (x.shape[1], 1))
        return super().forward(x if x.is_contiguous() else x + (read - x).detach(), token_mask, weights, indices)


class GradAssumedContiguous(GroupedExperts):
    """The output's gradient is read as if its rows were contiguous, if the gradient's memory is long enough."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return with_grad(super().forward(x, token_mask, weights, indices), self._read)

    @staticmethod
    def _read(grad: Tensor) -> Tensor:
        fits = grad.untyped_storage().nbytes() >= grad.numel() * grad.itemsize
        return torch.as_strided(grad, grad.shape, (grad.shape[1], 1)) if fits else grad


class FailsWithoutTokens(GroupedExperts):
    """The layer looks at the first active token, and raises an error if no token is active."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        int(token_mask.nonzero()[0])
        return super().forward(x, token_mask, weights, indices)


class BackwardDetachedWithoutTokens(GroupedExperts):
    """If no token is active, the output is zeros without a graph, and the gradients are None."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        right = super().forward(x, token_mask, weights, indices)
        return right if token_mask.any() else torch.zeros_like(right, requires_grad=right.requires_grad)


class RoundedWeights(GroupedExperts):
    """Routing weights and their gradients are rounded to bfloat16."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return super().forward(x, token_mask, weights.bfloat16().to(weights.dtype), indices)


class OnlyLongIndices(GroupedExperts):
    """The memory of the indices is read as int64, whatever their dtype is."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        if indices.dtype is torch.int32 and indices.numel() % 2 == 0:
            half = indices.contiguous().flatten().view(torch.int64) % self.n_routed_experts
            indices = torch.cat([half, torch.full_like(half, -1)]).view(indices.shape)
        return super().forward(x, token_mask, weights, indices)
