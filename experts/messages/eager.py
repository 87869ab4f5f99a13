"""Pack and unpack messages in plain torch. These functions define what `fused` does. On a GPU they wait for it."""

import torch
from torch import Tensor

from experts.activations import accumulation_dtype
from experts.exchange import MAX_INDEX
from experts.exchange.eager import number_tokens
from experts.messages import ALIGNMENT_BYTES, Form, Plan, choices_bytes, rounded_up


def plan(indices_TK: Tensor, num_ranks: int, n_local_experts: int) -> tuple[Tensor, Tensor]:
    """As `Messages.plan`."""
    row_TP, counts_P = number_tokens(indices_TK, num_ranks, n_local_experts)
    return row_TP, torch.stack([counts_P, torch.empty_like(counts_P)])


def pack(plan: Plan, x_TD: Tensor, weights_TK: Tensor | None = None, indices_TK: Tensor | None = None) -> Tensor:
    """As `Messages.pack`."""
    num_tokens, num_ranks = plan.row_TP.shape
    rows_SD = x_TD.new_empty(plan.form.most_rows(num_tokens, num_ranks - 1), plan.form.dim)
    for to, (start, _) in enumerate(_spans(plan.counts_P, plan.form, plan.own)):
        if to != plan.own:
            _pack(plan, to, rows_SD[start:], x_TD, weights_TK, indices_TK)
    return rows_SD


def pack_own(
    plan: Plan,
    message_SD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor | None = None,
    indices_TK: Tensor | None = None,
) -> None:
    """As `Messages.pack_own`."""
    _pack(plan, plan.own, message_SD, x_TD, weights_TK, indices_TK)


def _pack(
    plan: Plan, to: int, message_SD: Tensor, x_TD: Tensor, weights_TK: Tensor | None, indices_TK: Tensor | None
) -> None:
    form, token_N = plan.form, (plan.row_TP[:, to] >= 0).nonzero().squeeze(1)
    count = token_N.shape[0]
    message_SD[:count] = x_TD[token_N]
    if weights_TK is not None and indices_TK is not None:
        choices = pack_choices(weights_TK[token_N], indices_TK[token_N], count)
        first = form.choices_row(count) * form.row_bytes
        end = choices_bytes(count, form.n_activated_experts, form.weights_dtype)[1]
        message_SD.view(-1).view(torch.uint8)[first : first + end] = choices[:end]


def take_choices(received_RD: Tensor, counts_P: Tensor, longest: int, form: Form) -> tuple[Tensor, Tensor]:
    """As `Messages.take_choices`."""
    shape = received_RD.shape[0], form.n_activated_experts
    weights_RK = torch.zeros(shape, dtype=form.weights_dtype, device=received_RD.device)
    indices_RK = torch.full(shape, -1, device=received_RD.device)
    for start, count in _spans(counts_P, form):
        first = (start + form.choices_row(count)) * form.row_bytes
        at = choices_bytes(count, form.n_activated_experts, form.weights_dtype)
        choices = received_RD.view(-1).view(torch.uint8)[first : first + at[1]]
        weights, indices = _choices(choices, count, form.n_activated_experts, form.weights_dtype)
        weights_RK[start : start + count], indices_RK[start : start + count] = weights, indices
    return weights_RK, indices_RK


def sum_rows(
    plan: Plan, rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `Messages.sum_rows`."""
    return _sum(plan, *rows), None if weights is None else _sum(plan, *weights)


def pack_choices(weights_TK: Tensor, indices_TK: Tensor, num_rows: int) -> Tensor:
    """As `Messages.pack_choices`."""
    num_tokens, num_choices = weights_TK.shape
    start, end = choices_bytes(num_rows, num_choices, weights_TK.dtype)
    weights = weights_TK.new_zeros(num_rows, num_choices)
    indices = torch.full((num_rows, num_choices), -1, dtype=torch.int32, device=indices_TK.device)
    weights[:num_tokens] = weights_TK
    indices[:num_tokens] = indices_TK.clamp(-1, MAX_INDEX)
    packed = torch.zeros(rounded_up(end, ALIGNMENT_BYTES), dtype=torch.uint8, device=weights_TK.device)
    packed[: weights.nbytes] = weights.view(-1).view(torch.uint8)
    packed[start:end] = indices.view(-1).view(torch.uint8)
    return packed


def unpack_choices(
    packed: Tensor, num_rows: int, n_activated_experts: int, weights_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `Messages.unpack_choices`."""
    size = rounded_up(choices_bytes(num_rows, n_activated_experts, weights_dtype)[1], ALIGNMENT_BYTES)
    parts = packed.split(size) if size else [packed]
    both = [_choices(part, num_rows, n_activated_experts, weights_dtype) for part in parts]
    return torch.cat([weights for weights, _ in both]), torch.cat([indices for _, indices in both])


def _choices(packed: Tensor, count: int, n_activated_experts: int, weights_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    start, end = choices_bytes(count, n_activated_experts, weights_dtype)
    weights = packed[: count * n_activated_experts * weights_dtype.itemsize].clone().view(weights_dtype)
    indices = packed[start:end].clone().view(torch.int32)  # copies: views of bytes must be aligned
    return weights.view(count, n_activated_experts), indices.view(count, n_activated_experts).long()


def _spans(counts_P: Tensor, form: Form, absent: int = -1) -> list[tuple[int, int]]:
    """Return the first row and the number of tokens of each message. The message of a rank may be absent."""
    spans, start = [], 0
    for rank, count in enumerate(counts_P.tolist()):
        spans.append((start, count))
        start += form.length(count) if rank != absent else 0
    return spans


def _sum(plan: Plan, rows_SX: Tensor, own_SX: Tensor) -> Tensor:
    acc = accumulation_dtype(rows_SX.dtype)
    sums_TX = torch.zeros(plan.row_TP.shape[0], rows_SX.shape[1], dtype=acc, device=rows_SX.device)
    for source, (start, count) in enumerate(_spans(plan.counts_P, plan.form, plan.own)):
        part_NX = own_SX[:count] if source == plan.own else rows_SX[start : start + count]
        sums_TX[plan.row_TP[:, source] >= 0] += part_NX.to(acc)
    return sums_TX.to(rows_SX.dtype)
