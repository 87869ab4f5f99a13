"""Order tokens by the expert that wants them, and bring the experts' rows back to their tokens.

Nothing here waits for the device: the permuted side always has N = T·K rows, one for every choice of every token.
The rows of the local experts (the window `first`, `count`) come first, in groups by expert; choices of no local
expert (other ranks' experts, masked tokens, indices of −1) come last, past `offsets[-1]`. Those rows hold anything:
what an engine computes there, NaN included, is read by nobody.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts.activations import accumulation_dtype
from experts.errors import InputError

MAX_ROWS = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Permutation:
    """Where every row comes from and goes to. N = T·K; L local experts; a slot is one choice of one token, t·K + k."""

    row_to_slot_N: Tensor  # int64
    slot_to_row_N: Tensor  # int64, the inverse
    row_to_expert_N: Tensor  # int64, local expert, or L for the rows of none
    is_local_TK: Tensor  # bool
    tokens_per_expert_L: Tensor  # int64
    offsets_L: Tensor  # int32, cumulative: where each expert's group ends

    @property
    def n_activated_experts(self) -> int:
        return self.is_local_TK.shape[1]

    @property
    def row_to_token_N(self) -> Tensor:
        return self.row_to_slot_N // self.n_activated_experts

    def cut(self, num_rows: int) -> "Permutation":
        """Without the rows past the last group: `num_rows` is `offsets_L[-1]`, for callers that know it on the host."""
        return Permutation(
            self.row_to_slot_N[:num_rows],
            self.slot_to_row_N.clamp(max=max(num_rows - 1, 0)),  # who had a row past the end is not local
            self.row_to_expert_N[:num_rows],
            self.is_local_TK,
            self.tokens_per_expert_L,
            self.offsets_L,
        )


def sort_by_expert(indices_TK: Tensor, first: int, count: int) -> Permutation:
    """Permutation that groups choices by expert, stable, for the local experts `first` … `first + count − 1`.

    indices_TK: [T, K] any integer dtype; −1 and experts outside of the window take no part. Raises InputError where
    T·K exceeds what int32 offsets can count.
    """
    if indices_TK.numel() > MAX_ROWS:
        raise InputError(
            f"{indices_TK.numel()} choices of {indices_TK.shape[0]} tokens exceed {MAX_ROWS}, the most that int32 "
            "offsets can count; split the tokens over several calls"
        )
    local_TK = indices_TK.long() - first
    is_local_TK = (local_TK >= 0) & (local_TK < count)
    expert_N = torch.where(is_local_TK, local_TK, count).reshape(-1)
    row_to_expert_N, row_to_slot_N = torch.sort(expert_N, stable=True)
    slot_to_row_N = torch.empty_like(row_to_slot_N)
    slot_to_row_N[row_to_slot_N] = torch.arange(row_to_slot_N.numel(), device=row_to_slot_N.device)
    experts_L = torch.arange(count, device=row_to_expert_N.device)
    ends_L = torch.searchsorted(row_to_expert_N, experts_L, right=True)
    tokens_per_expert_L = torch.diff(ends_L, prepend=ends_L.new_zeros(1))
    return Permutation(row_to_slot_N, slot_to_row_N, row_to_expert_N, is_local_TK, tokens_per_expert_L, ends_L.int())


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Rows [N, D] of the tokens in permuted order. Its gradient sums a token's rows in float32, in a fixed order."""
    rows: Tensor = _Permute.apply(x_TD, permutation)
    return rows


def permute_weights(weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """Routing weights [N] in permuted order; zero, and without gradient, for rows of no local expert."""
    weights_N = weights_TK.reshape(-1).index_select(0, permutation.row_to_slot_N)
    is_local_N = permutation.row_to_expert_N < permutation.offsets_L.numel()
    return torch.where(is_local_N, weights_N, 0.0)


def unpermute(y_ND: Tensor, permutation: Permutation) -> Tensor:
    """Sum [T, D] of each token's rows, in float32 (float64 for float64), in the order of its choices, in y's dtype."""
    tokens: Tensor = _Unpermute.apply(y_ND, permutation)
    return tokens


def add_expert_bias(y_ND: Tensor, bias_LD: Tensor, permutation: Permutation, weights_N: Tensor | None = None) -> Tensor:
    """y plus the bias of each row's expert, times the routing weight where `weights_N` is given (down projection).

    Returns [N, D] in y's dtype; the sum is taken in float32 (float64 for float64).
    """
    arguments = (y_ND, bias_LD, weights_N, permutation)
    biased: Tensor = _AddExpertBias.apply(*arguments)
    return biased


def _sum_rows_of_tokens(rows_ND: Tensor, permutation: Permutation) -> Tensor:
    num_tokens, num_choices = permutation.is_local_TK.shape
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(num_tokens, rows_ND.shape[1])
    is_local_TK1 = permutation.is_local_TK.unsqueeze(-1)
    rows_TKD = rows_ND.index_select(0, permutation.slot_to_row_N).view(num_tokens, num_choices, -1)
    rows_TKD.masked_fill_(~is_local_TK1, 0.0)
    return rows_TKD.sum(dim=1, dtype=accumulation_dtype(rows_ND.dtype)).to(rows_ND.dtype)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return x_TD.index_select(0, permutation.row_to_token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return _sum_rows_of_tokens(grad_ND, ctx.permutation), None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _sum_rows_of_tokens(y_ND, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD.index_select(0, ctx.permutation.row_to_token_N), None


class _AddExpertBias(Function):
    """Written out so that the sum over an expert's rows is in float32, deterministic, and stops at the last group."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, bias_LD: Tensor, weights_N: Tensor | None, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        ctx.save_for_backward(bias_LD, weights_N)
        return (y_ND + _bias_of_rows(bias_LD, weights_N, permutation, y_ND.dtype)).to(y_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        bias_LD, weights_N = ctx.saved_tensors
        permutation: Permutation = ctx.permutation
        grad_acc_ND = grad_ND.to(accumulation_dtype(grad_ND.dtype))
        weighted_ND = grad_acc_ND if weights_N is None else grad_acc_ND * weights_N.to(grad_acc_ND.dtype).unsqueeze(-1)
        # unsafe: lengths that stop short of N are meant, and checking them would wait for the device
        grad_bias_LD = torch.segment_reduce(
            weighted_ND, "sum", lengths=permutation.tokens_per_expert_L, axis=0, unsafe=True, initial=0.0
        ).to(bias_LD.dtype)
        if weights_N is None:
            return grad_ND, grad_bias_LD, None, None
        bias_ND = _bias_of_rows(bias_LD, None, permutation, grad_ND.dtype)
        return grad_ND, grad_bias_LD, (grad_acc_ND * bias_ND).sum(dim=-1).to(weights_N.dtype), None


def _bias_of_rows(bias_LD: Tensor, weights_N: Tensor | None, permutation: Permutation, dtype: torch.dtype) -> Tensor:
    last = bias_LD.shape[0] - 1
    bias_ND = bias_LD.index_select(0, permutation.row_to_expert_N.clamp(max=last)).to(accumulation_dtype(dtype))
    return bias_ND if weights_N is None else bias_ND * weights_N.to(bias_ND.dtype).unsqueeze(-1)
