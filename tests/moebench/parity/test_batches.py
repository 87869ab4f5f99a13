"""Every row of this rank's experts is in one batch, once."""

import torch

from moebench.parity.batches import batches
from moebench.parity.together import ON_CPU


def rows_of(found):
    """Return expert, token and choice of every row of the batches."""
    rows = []
    for batch in found:
        for g, expert in enumerate(batch.experts_G.tolist()):
            valid = batch.valid_GM[g]
            pairs = zip(batch.tokens_GM[g][valid].tolist(), batch.choices_GM[g][valid].tolist(), strict=True)
            rows += [(expert, token, choice) for token, choice in pairs]
    return rows


INDICES_TK = torch.tensor([[0, 3], [3, -1], [5, 0], [-1, -1], [3, 2]])


def expected(first, num_local):
    local = INDICES_TK - first
    inside = (INDICES_TK >= 0) & (local >= 0) & (local < num_local)
    return sorted((int(local[t, k]), t, k) for t, k in inside.nonzero().tolist())


def test_every_row_of_an_expert_of_the_rank_is_there_once():
    for first, num_local in ((0, 6), (0, 3), (3, 3)):
        for by_itself in (False, True):
            found = list(batches(INDICES_TK, first, num_local, 8, by_itself))
            assert sorted(rows_of(found)) == expected(first, num_local)
            assert all(len(batch.experts_G) == 1 for batch in found) or not by_itself


def test_experts_without_rows_are_in_no_batch():
    (batch,) = batches(INDICES_TK, 0, 6, 8, False)
    assert sorted(batch.experts_G.tolist()) == [0, 2, 3, 5]
    assert list(batches(torch.full((3, 2), -1), 0, 6, 8, False)) == []
    assert list(batches(torch.empty(0, 2, dtype=torch.int64), 0, 6, 8, False)) == []


def test_batches_are_small_enough():
    """Sixteen experts with matrices of a quarter of what runs together run at most four at a time."""
    indices_TK = torch.arange(16).view(16, 1)
    found = list(batches(indices_TK, 0, 16, ON_CPU.elements // 4, False))
    assert len(found) >= 4
    assert max(len(batch.experts_G) for batch in found) <= 4
    assert len(rows_of(found)) == 16


def test_padding_is_zero_and_is_not_added():
    (batch,) = batches(torch.tensor([[0], [1], [1]]), 0, 2, 8, False)
    assert (~batch.valid_GM).sum() == 1
    x_TD = torch.tensor([[1.0, 10.0], [2.0, 20.0], [float("nan")] * 2])
    rows_GMD = batch.rows(x_TD)
    assert not rows_GMD[~batch.valid_GM].any()
    sums_TD = torch.zeros(3, 2)
    batch.add_rows(sums_TD, torch.ones_like(rows_GMD))
    assert sums_TD.tolist() == [[1, 1]] * 3
    weights_TK = torch.tensor([[0.5], [0.25], [0.125]])
    into_TK = torch.zeros(3, 1)
    batch.put_weights(into_TK, batch.weights(weights_TK))
    assert torch.equal(into_TK, weights_TK)
