"""Permutation by expert, against lists sorted in plain Python: order, windows, offsets, rows past the last group."""

import pytest
import torch
from torch import Tensor

from experts import InputError
from experts.permutation import MAX_ROWS, Permutation, combine, permute, sort_by_expert, weighted_activation
from tests.experts.layers import BF16, F32, F64, moe_config

EXPERTS = 6
WINDOWS = [(0, 6), (0, 2), (2, 3), (4, 2), (5, 1), (6, 2), (0, 1)]
on_every_window = pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w[0]}+{w[1]}")

ROUTINGS = {
    "mixed": [[3, 0], [-1, 5], [0, 3], [2, 2], [5, -1], [0, 4], [-1, -1], [2, 0]],
    "one-token": [[4, 1]],
    "no-token": [],
    "one-expert": [[3, 3], [3, 3], [3, 3]],
    "nobody": [[-1, -1], [-1, -1]],
    "last-first": [[5, 4], [3, 2], [1, 0]],
    "three-choices": [[0, 1, 0], [5, 0, -1], [1, 1, 1]],
}
on_every_routing = pytest.mark.parametrize("routing", ROUTINGS)


def routed(routing: str, dtype: torch.dtype = torch.int64) -> Tensor:
    choices = ROUTINGS[routing]
    return torch.tensor(choices, dtype=dtype).reshape(len(choices), len(choices[0]) if choices else 2)


def groups(routing: str, first: int, count: int) -> list[list[tuple[int, int]]]:
    """Return the (token, choice) pairs of each local expert, in the order of the tokens."""
    return [
        [(t, k) for t, row in enumerate(ROUTINGS[routing]) for k, expert in enumerate(row) if expert == index]
        for index in range(first, first + count)
    ]


def slots(permutation: Permutation) -> list[tuple[int, int]]:
    k = permutation.n_activated_experts
    return [(slot // k, slot % k) for slot in permutation.row_to_slot_N.tolist()]


@on_every_routing
@on_every_window
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
def test_rows_are_grouped_by_expert_in_the_tokens_order(
    routing: str, window: tuple[int, int], dtype: torch.dtype
) -> None:
    found = sort_by_expert(routed(routing, dtype), *window)
    right = groups(routing, *window)
    in_order = [pair for group in right for pair in group]
    assert slots(found)[: len(in_order)] == in_order
    assert found.tokens_per_expert_L.tolist() == [len(group) for group in right]
    assert found.offsets_L.tolist() == [sum(map(len, right[: index + 1])) for index in range(window[1])]


@on_every_routing
@on_every_window
def test_rows_without_a_local_expert_come_last(routing: str, window: tuple[int, int]) -> None:
    found = sort_by_expert(routed(routing), *window)
    num_local = sum(map(len, groups(routing, *window)))
    experts = found.row_to_expert_N.tolist()
    assert all(0 <= expert < window[1] for expert in experts[:num_local])
    assert experts[num_local:] == [window[1]] * (len(experts) - num_local)
    assert experts == sorted(experts)


@on_every_routing
@on_every_window
def test_every_slot_has_one_row(routing: str, window: tuple[int, int]) -> None:
    indices = routed(routing)
    found = sort_by_expert(indices, *window)
    everything = torch.arange(indices.numel())
    assert torch.equal(found.row_to_slot_N.sort().values, everything)
    assert torch.equal(found.slot_to_row_S[found.row_to_slot_N], everything)
    assert torch.equal(found.row_to_slot_N[found.slot_to_row_S], everything)
    assert torch.equal(found.row_to_token_N, found.row_to_slot_N // indices.shape[1])
    assert torch.equal(found.is_local_TK, (indices >= window[0]) & (indices < sum(window)))


def test_the_permutation_has_the_dtypes_that_kernels_need() -> None:
    found = sort_by_expert(routed("mixed"), 0, EXPERTS)
    assert found.offsets_L.dtype is torch.int32
    assert found.tokens_per_expert_L.dtype is torch.int64
    assert found.row_to_slot_N.dtype is found.slot_to_row_S.dtype is found.row_to_expert_N.dtype is torch.int64


def test_the_order_is_stable_for_many_tokens() -> None:
    """An unstable sort may keep the order of a few tokens, but not of thousands."""
    indices = torch.randint(0, 3, (4000, 2), generator=torch.Generator().manual_seed(5))
    found = sort_by_expert(indices, 0, 3)
    start = 0
    for end in found.offsets_L.tolist():
        assert bool((found.row_to_slot_N[start:end].diff() > 0).all())
        start = end


def test_indices_may_be_non_contiguous() -> None:
    indices = routed("mixed")
    found = sort_by_expert(indices.t().contiguous().t(), 0, EXPERTS)
    assert torch.equal(found.row_to_slot_N, sort_by_expert(indices, 0, EXPERTS).row_to_slot_N)


@pytest.mark.parametrize("num_tokens", [2**30, 2**31, 2**33])
def test_more_rows_than_int32_offsets_can_count_are_refused(num_tokens: int) -> None:
    right = f"{2 * num_tokens} choices of {num_tokens} tokens exceed 2147483647"
    with pytest.raises(InputError, match=right) as caught:
        sort_by_expert(torch.empty(num_tokens, 2, dtype=torch.int8, device="meta"), 0, EXPERTS)
    assert "\n" not in str(caught.value)


def test_as_many_rows_as_int32_offsets_can_count_are_accepted() -> None:
    assert MAX_ROWS == 2**31 - 1
    found = sort_by_expert(torch.empty(MAX_ROWS, 1, dtype=torch.int8, device="meta"), 0, EXPERTS)
    assert found.row_to_slot_N.shape == (MAX_ROWS,)


def tokens(routing: str, dim: int = 5, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(len(ROUTINGS[routing]), dim, dtype=F64, generator=generator).to(dtype)


@on_every_routing
@on_every_window
def test_combine_after_permute_gives_each_token_times_its_local_choices(routing: str, window: tuple[int, int]) -> None:
    """`permute` copies the tokens' rows. The gradient of a token is also multiplied by its number of local choices."""
    x_TD = tokens(routing).requires_grad_()
    found = sort_by_expert(routed(routing), *window)
    rows_ND = permute(x_TD, found)
    assert torch.equal(rows_ND, x_TD[[t for t, _ in slots(found)]])
    poisoned_ND = rows_ND.clone()
    poisoned_ND[sum(map(len, groups(routing, *window))) :] = torch.nan
    back_TD = combine(poisoned_ND, found, None, None, after=False)
    times_T1 = found.is_local_TK.sum(dim=1, keepdim=True)
    torch.testing.assert_close(back_TD, x_TD * times_T1, rtol=1e-15, atol=0)
    grad_TD = tokens(routing).sin()
    back_TD.backward(grad_TD)
    torch.testing.assert_close(x_TD.grad, grad_TD * times_T1, rtol=1e-15, atol=0)


@on_every_routing
@on_every_window
def test_the_gradient_of_permute_reads_no_row_past_the_last_group(routing: str, window: tuple[int, int]) -> None:
    x_TD = tokens(routing).requires_grad_()
    found = sort_by_expert(routed(routing), *window)
    num_local = sum(map(len, groups(routing, *window)))
    grad_ND = tokens(routing).sin()[found.row_to_token_N]
    grad_ND[num_local:] = torch.nan
    permute(x_TD, found).backward(grad_ND)
    right_TD = torch.zeros_like(x_TD)
    for row, (t, _) in enumerate(slots(found)[:num_local]):
        right_TD[t] += grad_ND[row]
    torch.testing.assert_close(x_TD.grad, right_TD, rtol=1e-14, atol=1e-15)


RELU2 = moe_config(expert_activation="relu2")  # relu(x)² is 1 for x = 1


@on_every_routing
@on_every_window
def test_each_row_gets_its_routing_weight_and_other_weights_are_not_read(routing: str, window: tuple[int, int]) -> None:
    indices = routed(routing)
    weights_TK = torch.rand(indices.shape, generator=torch.Generator().manual_seed(7), dtype=F64)
    found = sort_by_expert(indices, *window)
    weights_TK[~found.is_local_TK] = torch.nan
    weights_TK.requires_grad_()
    num_local = sum(map(len, groups(routing, *window)))
    ones_N1 = torch.ones(indices.numel(), 1, dtype=F64)
    weights_N1 = weighted_activation(ones_N1, found, weights_TK, None, RELU2)
    assert weights_N1[:num_local, 0].tolist() == [weights_TK[pair].item() for pair in slots(found)[:num_local]]
    grad_N1 = torch.arange(1.0, indices.numel() + 1, dtype=F64).unsqueeze(1)
    grad_N1[num_local:] = torch.nan
    weights_N1.backward(grad_N1)
    right_TK = torch.zeros(indices.shape, dtype=F64)
    for row, pair in enumerate(slots(found)[:num_local]):
        right_TK[pair] = row + 1
    assert torch.equal(weights_TK.grad, right_TK)


@on_every_routing
@on_every_window
def test_the_bias_of_each_rows_expert_is_added_before_the_activation(routing: str, window: tuple[int, int]) -> None:
    """Rows past the last group change no bias gradient, even with NaN in their own gradient."""
    found = sort_by_expert(routed(routing), *window)
    num_rows, num_local = found.num_rows, sum(map(len, groups(routing, *window)))
    generator = torch.Generator().manual_seed(8)
    h_NI = torch.randn(num_rows, 5, dtype=F64, generator=generator).requires_grad_()
    bias_LI = torch.randn(window[1], 5, dtype=F64, generator=generator).requires_grad_()
    grad_NI = torch.randn(num_rows, 5, dtype=F64, generator=generator)
    grad_NI[num_local:] = torch.nan
    a_NI = weighted_activation(h_NI, found, None, bias_LI, RELU2)
    a_NI.backward(grad_NI)
    grad_bias_LI = torch.zeros_like(bias_LI)
    for row, expert in enumerate(found.row_to_expert_N.tolist()[:num_local]):
        positive = (h_NI[row] + bias_LI[expert]).detach().clamp(min=0)
        torch.testing.assert_close(a_NI[row], positive**2, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(h_NI.grad[row], grad_NI[row] * 2 * positive, rtol=1e-14, atol=1e-15)
        grad_bias_LI[expert] += grad_NI[row] * 2 * positive
    torch.testing.assert_close(bias_LI.grad, grad_bias_LI, rtol=1e-13, atol=1e-14)


@on_every_routing
@on_every_window
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("after", [False, True], ids=["before-down", "after-down"])
def test_combine_gives_the_weighted_sum_and_its_gradients(
    routing: str, window: tuple[int, int], bias: bool, after: bool
) -> None:
    """The sum is of y + weight·bias, or of weight·(y + bias). Rows past the last group may hold anything."""
    indices = routed(routing)
    found = sort_by_expert(indices, *window)
    num_rows, num_local = found.num_rows, sum(map(len, groups(routing, *window)))
    generator = torch.Generator().manual_seed(9)
    y_ND, bias_LD = (torch.randn(n, 5, dtype=F64, generator=generator) for n in (num_rows, window[1]))
    weights_TK = torch.rand(indices.shape, dtype=F64, generator=generator)
    grad_TD = torch.randn(len(indices), 5, dtype=F64, generator=generator)

    given = [y_ND, weights_TK, bias_LD] if bias else [y_ND, weights_TK]
    used = [0] + [1] * (bias or after) + [2] * bias

    leaves = [tensor.clone().requires_grad_() for tensor in given]
    zero = sum(leaf.sum() for leaf in leaves) * 0
    rows = [zero.expand(5) for _ in range(len(indices))]
    for row, (t, k) in enumerate(slots(found)[:num_local]):
        y, weight, added = leaves[0][row], leaves[1][t, k], 0.0
        if bias:
            added = leaves[2][int(indices[t, k]) - window[0]]
        rows[t] = rows[t] + (weight * (y + added) if after else y + weight * added)
    right_TD = torch.stack(rows) if rows else zero.expand(0, 5)
    right = torch.autograd.grad(right_TD, [leaves[i] for i in used], grad_TD)

    y_ND[num_local:] = torch.nan
    weights_TK[~found.is_local_TK] = torch.nan
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    found_TD = combine(leaves[0], found, leaves[1], leaves[2] if bias else None, after)
    mine = torch.autograd.grad(found_TD, [leaves[i] for i in used], grad_TD)
    torch.testing.assert_close(found_TD, right_TD, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(mine[0][:num_local], right[0][:num_local], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(mine[1:], right[1:], rtol=1e-12, atol=1e-14)


@on_every_routing
@on_every_window
def test_a_permutation_cut_to_the_local_rows_gives_the_same_results(routing: str, window: tuple[int, int]) -> None:
    """A caller that knows the number of local rows on the host may cut the rest. Only the rows past them change."""
    whole = sort_by_expert(routed(routing), *window)
    num_local = sum(map(len, groups(routing, *window)))
    found = whole.cut(num_local)
    x_TD = tokens(routing).requires_grad_()
    weights_TK = torch.rand(routed(routing).shape, generator=torch.Generator().manual_seed(7), dtype=F64)
    bias_LD = torch.ones(window[1], 5, dtype=F64).requires_grad_()
    weights_TK.requires_grad_()
    results = []
    for permutation in (whole, found):
        rows_ND = permute(x_TD, permutation)
        a_ND = weighted_activation(rows_ND, permutation, weights_TK, bias_LD, RELU2)
        back_TD = combine(a_ND, permutation, weights_TK, bias_LD, after=True)
        gradients = torch.autograd.grad(back_TD, (x_TD, weights_TK, bias_LD), tokens(routing).sin())
        results.append([rows_ND[:num_local], a_ND[:num_local], back_TD, *gradients])
    assert permute(x_TD, found).shape == (num_local, 5)
    assert weighted_activation(rows_ND, found, weights_TK, None, RELU2).shape == (num_local, 5)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_bias_without_rows_gets_a_zero_gradient() -> None:
    found = sort_by_expert(routed("nobody"), 0, 3)
    weights_TK, y_ND = torch.ones(2, 2), torch.ones(4, 5, requires_grad=True)
    for used in (
        lambda bias_LD: combine(y_ND, found, weights_TK, bias_LD, after=False),
        lambda bias_LD: weighted_activation(y_ND, found, weights_TK, bias_LD, RELU2),
    ):
        bias_LD = torch.ones(3, 5, requires_grad=True)
        used(bias_LD).sum().backward()
        assert torch.equal(bias_LD.grad, torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_dtypes_are_kept_and_sums_are_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16, 256 + 7 rounded once is 264, and 256 if each 1 is added separately. 512 ones must give 512."""
    indices = torch.zeros(1, 8, dtype=torch.int64)
    found = sort_by_expert(indices, 0, 1)
    rows_ND = torch.ones(8, 2, dtype=dtype)
    rows_ND[0] = 256
    right = torch.tensor(263.0).to(dtype).item()
    sums_TD = combine(rows_ND, found, None, None, after=False)
    assert sums_TD.tolist() == [[right, right]]
    assert sums_TD.dtype is dtype

    x_TD = torch.ones(1, 2, dtype=dtype, requires_grad=True)
    permute(x_TD, found).backward(rows_ND)
    assert x_TD.grad.tolist() == [[right, right]]
    assert x_TD.grad.dtype is dtype

    bias_LD = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    many = sort_by_expert(torch.zeros(512, 1, dtype=torch.int64), 0, 1)
    rows_ND, weights_TK = torch.ones(512, 2, dtype=dtype), torch.ones(512, 1)
    combine(rows_ND, many, weights_TK, bias_LD, after=False).backward(torch.ones(512, 2, dtype=dtype))
    assert bias_LD.grad.tolist() == [[512, 512]]
    assert bias_LD.grad.dtype is dtype


def test_the_weighted_bias_is_not_rounded_before_it_is_added() -> None:
    """In bfloat16, 1 + 2/256 follows 1. The sum 1 + 1.4/256 − 0.6/256 rounds to 1.

    If the weighted bias 1 + 1.4/256 were rounded first, the sum would round to 1 + 2/256.
    """
    found = sort_by_expert(torch.zeros(1, 1, dtype=torch.int64), 0, 1)
    y_ND = torch.full((1, 1), -0.6 / 256, dtype=BF16)
    weights_TK = torch.tensor([[1 + 1.4 / 256]])
    assert combine(y_ND, found, weights_TK, torch.ones(1, 1, dtype=BF16), after=False).item() == 1
