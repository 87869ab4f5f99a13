"""Run the steps in plain torch. These functions define what each step computes."""

import torch
from torch import Tensor

from experts.activations import accumulation_dtype, get_expert_activation_for_deepep
from experts.config import MoEConfig
from experts.steps import Permutation

#: The most rows that are added one after the other. Long sums are sums of sums, so that rounding errors stay small.
BLOCK = 16


def mask_choices(indices_TK: Tensor, token_mask_T: Tensor) -> Tensor:
    """As `Steps.mask_choices`."""
    return indices_TK.long().masked_fill(~token_mask_T.unsqueeze(-1), -1)


def sort_by_expert(indices_TK: Tensor, first: int, count: int) -> Permutation:
    """As `Steps.sort_by_expert`."""
    local_TK = indices_TK.long() - first
    expert_N = torch.where((local_TK >= 0) & (local_TK < count), local_TK, count).reshape(-1)
    row_to_expert_N, row_to_slot_N = torch.sort(expert_N, stable=True)
    slot_to_row_S = torch.empty_like(row_to_slot_N)
    slot_to_row_S[row_to_slot_N] = torch.arange(row_to_slot_N.numel(), device=row_to_slot_N.device)
    experts_L = torch.arange(count, device=row_to_expert_N.device)
    offsets_L = torch.searchsorted(row_to_expert_N, experts_L, right=True).int()
    return Permutation(row_to_slot_N, slot_to_row_S, row_to_expert_N, offsets_L, indices_TK.shape[1])


def gather_rows(x_TD: Tensor, permutation: Permutation, weights_TK: Tensor | None = None) -> Tensor:
    """As `Steps.gather_rows`."""
    rows_ND = x_TD.index_select(0, permutation.row_to_token_N)
    if weights_TK is None:
        return rows_ND
    return (rows_ND.to(accumulation_dtype(x_TD.dtype)) * _weights_N1(weights_TK, permutation, x_TD)).to(x_TD.dtype)


def sum_rows(
    y_ND: Tensor,
    permutation: Permutation,
    weights_TK: Tensor | None = None,
    bias_LD: Tensor | None = None,
    weigh_rows: bool = False,
) -> Tensor:
    """As `Steps.sum_rows`."""
    acc = accumulation_dtype(y_ND.dtype)
    if bias_LD is not None or weigh_rows:
        assert weights_TK is not None
        weights_N1 = _weights_N1(weights_TK, permutation, y_ND)
        bias_ND = 0.0 if bias_LD is None else _bias_of_rows(bias_LD, permutation)
        rows_ND = weights_N1 * (y_ND.to(acc) + bias_ND) if weigh_rows else y_ND.to(acc) + weights_N1 * bias_ND
    else:
        rows_ND = y_ND
    return _of_choices(rows_ND, permutation).sum(dim=1, dtype=acc).to(y_ND.dtype)


def activate(
    h_NH: Tensor, permutation: Permutation, weights_TK: Tensor | None, bias_LH: Tensor | None, config: MoEConfig
) -> Tensor:
    """As `Steps.activate`."""
    acc_NH = h_NH.to(accumulation_dtype(h_NH.dtype))
    if bias_LH is not None:
        acc_NH = acc_NH + _bias_of_rows(bias_LH, permutation)
    weights_N = acc_NH.new_ones(h_NH.shape[0])
    if weights_TK is not None:
        weights_N = _weights_N1(weights_TK, permutation, h_NH).squeeze(-1)
    return get_expert_activation_for_deepep(config)(acc_NH, weights_N).to(h_NH.dtype)


def activate_backward(
    h_NH: Tensor,
    grad_NI: Tensor,
    permutation: Permutation,
    weights_TK: Tensor | None,
    bias_LH: Tensor | None,
    config: MoEConfig,
    again: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `Steps.activate_backward`."""
    acc = accumulation_dtype(h_NH.dtype)
    with torch.enable_grad():
        h_NH = h_NH.detach().requires_grad_()
        weights_TK = None if weights_TK is None else weights_TK.detach().to(acc).requires_grad_()
        a_NI = activate(h_NH, permutation, weights_TK, bias_LH, config)
        wanted = [h_NH] if weights_TK is None else [h_NH, weights_TK]
        grad_h_NH, *grad_weights = torch.autograd.grad(a_NI, wanted, grad_NI)
    return grad_h_NH, a_NI.detach() if again else None, grad_weights[0] if grad_weights else None


def sum_by_expert(rows_NC: Tensor, permutation: Permutation, weights_TK: Tensor | None = None) -> Tensor:
    """As `Steps.sum_by_expert`."""
    acc_NC = rows_NC.to(accumulation_dtype(rows_NC.dtype))
    if weights_TK is not None:
        acc_NC = acc_NC * _weights_N1(weights_TK, permutation, rows_NC)
    counts_L, most = permutation.tokens_per_expert_L, permutation.num_rows
    while most > BLOCK:
        lengths, counts_L = _blocks(counts_L, acc_NC.shape[0])
        acc_NC, most = _sum_segments(acc_NC, lengths), -(-most // BLOCK)
    return _sum_segments(acc_NC, counts_L).to(rows_NC.dtype)


def dot_rows(x_TD: Tensor, permutation: Permutation, y_ND: Tensor | None, bias_LD: Tensor | None) -> Tensor:
    """As `Steps.dot_rows`."""
    acc = accumulation_dtype(x_TD.dtype)
    x_ND = gather_rows(x_TD, permutation).to(acc)
    rows_ND = torch.zeros_like(x_ND) if y_ND is None else y_ND.to(acc)
    if bias_LD is not None:
        rows_ND = rows_ND + _bias_of_rows(bias_LD, permutation)
    return _of_choices((x_ND * rows_ND).sum(dim=1, keepdim=True), permutation).squeeze(-1)


def _blocks(counts_L: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Cut each expert's rows into blocks of at most BLOCK rows.

    Returns the length of every block, with zeros at the end, and the number of blocks of each expert, [L].
    """
    blocks_L = (counts_L + BLOCK - 1) // BLOCK
    ends_L = blocks_L.cumsum(0)
    block_M = torch.arange(num_rows // BLOCK + counts_L.numel(), device=counts_L.device)  # as many as any routing needs
    expert_M = torch.searchsorted(ends_L, block_M, right=True).clamp(max=counts_L.numel() - 1)
    first_M = (ends_L - blocks_L)[expert_M]
    return (counts_L[expert_M] - (block_M - first_M) * BLOCK).clamp(0, BLOCK), blocks_L


def _sum_segments(rows_NC: Tensor, lengths: Tensor) -> Tensor:
    """Return the sum of each segment of consecutive rows, one row after the other. An empty segment sums to zero."""
    # unsafe=True: the lengths sum to less than N on purpose, and checking them would wait for the device
    return torch.segment_reduce(rows_NC, "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0)


def _of_choices(rows_ND: Tensor, permutation: Permutation) -> Tensor:
    """Return the row of each choice, [T, K, D], with zeros for a choice that is not local."""
    shape = permutation.num_tokens, permutation.n_activated_experts, rows_ND.shape[1]
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(shape)
    rows_S = permutation.slot_to_row_S.clamp(max=rows_ND.shape[0] - 1)
    chosen_TKD = rows_ND.index_select(0, rows_S).view(shape)
    return chosen_TKD.masked_fill_(~permutation.is_local_TK.unsqueeze(-1), 0.0)


def _weights_N1(weights_TK: Tensor, permutation: Permutation, like: Tensor) -> Tensor:
    """Return the routing weights [N, 1] in permuted order.

    A row without a local expert has the weight zero, without gradient.
    """
    weights_N = weights_TK.reshape(-1).index_select(0, permutation.row_to_slot_N)
    is_local_N = permutation.row_to_expert_N < permutation.offsets_L.numel()
    return torch.where(is_local_N, weights_N, 0.0).to(accumulation_dtype(like.dtype)).unsqueeze(-1)


def _bias_of_rows(bias_LD: Tensor, permutation: Permutation) -> Tensor:
    last = bias_LD.shape[0] - 1
    rows_ND = bias_LD.index_select(0, permutation.row_to_expert_N.clamp(max=last))
    return rows_ND.to(accumulation_dtype(bias_LD.dtype))
