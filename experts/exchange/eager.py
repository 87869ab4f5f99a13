"""Move rows between ranks in plain torch. These functions define what `fused` does."""

import torch
from torch import Tensor

from experts.activations import accumulation_dtype
from experts.exchange import MAX_INDEX, Slabs


def place(slabs: Slabs, indices_TK: Tensor, n_local_experts: int) -> Tensor:
    """As `Exchange.place`."""
    row_TP, counts_P = number_tokens(indices_TK, slabs.layout.num_ranks, n_local_experts)
    for region in slabs.regions:
        region.counts_PP[slabs.rank] = counts_P
    return row_TP


def number_tokens(indices_TK: Tensor, num_ranks: int, n_local_experts: int) -> tuple[Tensor, Tensor]:
    """Number the tokens that go to each rank: [T, P], −1 if a token stays away, and counts [P]. Both are int32."""
    ranks_P = torch.arange(num_ranks, device=indices_TK.device)
    rank_TK = indices_TK // n_local_experts  # −1 stays −1
    goes_TP = (rank_TK.unsqueeze(-1) == ranks_P).any(dim=1)
    return torch.where(goes_TP, goes_TP.cumsum(dim=0) - 1, -1).int(), goes_TP.sum(dim=0, dtype=torch.int32)


def push(
    slabs: Slabs,
    x_TX: Tensor,
    row_TP: Tensor,
    rows_RX: Tensor,
    weights_TK: Tensor | None = None,
    indices_TK: Tensor | None = None,
) -> None:
    """As `Exchange.push`."""
    for rank, (region, token_N) in enumerate(zip(slabs.regions, _tokens_of_ranks(slabs, row_TP), strict=True)):
        num_rows, target_RX = token_N.shape[0], rows_RX if rank == slabs.rank else region.rows_as(x_TX)
        target_RX[slabs.own_slab][:num_rows] = x_TX[token_N]
        if weights_TK is not None and indices_TK is not None:
            region.weights_RK[slabs.own_slab][:num_rows] = weights_TK[token_N]
            region.indices_RK[slabs.own_slab][:num_rows] = indices_TK[token_N].clamp(-1, MAX_INDEX).int()


def take_choices(slabs: Slabs) -> tuple[Tensor, Tensor, Tensor]:
    """As `Exchange.take_choices`."""
    counts_P = slabs.own.counts_PP[:, slabs.rank].clamp(max=slabs.layout.rows_per_slab)
    filled_R1 = _filled(slabs, counts_P).unsqueeze(-1)
    weights_RK = torch.where(filled_R1, slabs.own.weights_RK, 0.0)
    return weights_RK, torch.where(filled_R1, slabs.own.indices_RK, -1).long(), counts_P


def take_rows(slabs: Slabs, counts_P: Tensor, rows_RX: Tensor) -> None:
    """As `Exchange.take_rows`."""
    of_others_R = _of_others(slabs, counts_P)
    rows_RX[of_others_R] = slabs.own.rows_as(rows_RX)[of_others_R]


def push_back(slabs: Slabs, y_RD: Tensor, counts_P: Tensor, weights_RK: Tensor | None = None) -> None:
    """As `Exchange.push_back`."""
    for rank, (region, count) in enumerate(zip(slabs.regions, counts_P.tolist(), strict=True)):
        if rank != slabs.rank:
            region.rows_RD[slabs.own_slab][:count] = y_RD[slabs.slab(rank)][:count]
            if weights_RK is not None:
                region.weights_RK[slabs.own_slab][:count] = weights_RK[slabs.slab(rank)][:count]


def sum_rows(
    slabs: Slabs, row_TP: Tensor, y_RD: Tensor, weights_RK: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `Exchange.sum_rows`."""
    tokens = _tokens_of_ranks(slabs, row_TP)

    def total(region_RX: Tensor, own_RX: Tensor) -> Tensor:
        rows = [own_RX if rank == slabs.rank else region_RX for rank in range(slabs.layout.num_ranks)]
        return _sum([rows_RX[slabs.slab(rank)] for rank, rows_RX in enumerate(rows)], tokens, row_TP.shape[0])

    sums_TD = total(slabs.own.rows_RD, y_RD)
    return sums_TD, None if weights_RK is None else total(slabs.own.weights_RK, weights_RK)


def _tokens_of_ranks(slabs: Slabs, row_TP: Tensor) -> list[Tensor]:
    """Return, for each rank, the tokens that have a row in its region, in the order of the rows."""
    has_row_TP = (row_TP >= 0) & (row_TP < slabs.layout.rows_per_slab)
    return [has_row_T.nonzero().squeeze(1) for has_row_T in has_row_TP.unbind(dim=1)]


def _filled(slabs: Slabs, counts_P: Tensor) -> Tensor:
    """Return whether each row of this rank's region was filled, [R] bool."""
    rows_C = torch.arange(slabs.layout.rows_per_slab, device=counts_P.device)
    return (rows_C < counts_P.unsqueeze(-1)).view(-1)


def _of_others(slabs: Slabs, counts_P: Tensor) -> Tensor:
    """Return whether another rank filled each row of this rank's region, [R] bool."""
    filled_R = _filled(slabs, counts_P)
    filled_R[slabs.own_slab] = False
    return filled_R


def _sum(slabs_CX: list[Tensor], tokens: list[Tensor], num_tokens: int) -> Tensor:
    dtype = slabs_CX[0].dtype
    sums_TX = torch.zeros(num_tokens, slabs_CX[0].shape[1], dtype=accumulation_dtype(dtype), device=slabs_CX[0].device)
    for slab_CX, token_N in zip(slabs_CX, tokens, strict=True):
        sums_TX[token_N] += slab_CX[: token_N.shape[0]].to(sums_TX.dtype)
    return sums_TX.to(dtype)
