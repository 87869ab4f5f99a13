"""What each rank of a case receives: its tokens, and its share of the experts."""

import pytest
import torch

from moebench.workload.case import Case
from moebench.workload.inputs import make_inputs, make_parameters

CPU = torch.device("cpu")


def case(**fields):
    shape = {"num_tokens": 24, "n_routed_experts": 8, "n_activated_experts": 2, "dim": 32, "moe_inter_dim": 16}
    unkind = {"expert_bias": True, "masked_share": 0.25, "routing": "zipf"}
    return Case.model_validate({**shape, **unkind, "dtype": "float32", "ep_size": 2, **fields})


@pytest.mark.parametrize(
    ("rank_load", "ep_size", "tokens"),
    [
        ("even", 4, [24, 24, 24, 24]),
        ("uneven", 4, [6, 12, 18, 24]),
        ("uneven", 2, [12, 24]),
        ("one-empty", 4, [24, 24, 24, 0]),
    ],
)
def test_how_many_tokens_a_rank_has(rank_load, ep_size, tokens):
    one = case(rank_load=rank_load, ep_size=ep_size)
    assert [one.tokens_of_rank(rank) for rank in range(ep_size)] == tokens
    active = [count * 3 // 4 for count in tokens]
    assert one.num_active_tokens == sum(count - round(count / 4) for count in tokens) / ep_size
    for rank, count in enumerate(tokens):
        inputs = make_inputs(one, CPU, rank)
        shapes = {len(tensor) for tensor in (inputs.x_TD, inputs.token_mask_T, inputs.weights_TK, inputs.indices_TK)}
        assert shapes == {count}
        assert abs(int(inputs.token_mask_T.sum()) - active[rank]) <= 1


def test_no_rank_has_no_tokens_for_being_uneven():
    one = case(rank_load="uneven", ep_size=8, num_tokens=3)
    assert [one.tokens_of_rank(rank) for rank in range(8)] == [1, 1, 2, 2, 2, 3, 3, 3]


def rows_per_expert(one, rank):
    return make_inputs(one, CPU, rank).indices_TK.flatten().bincount(minlength=one.n_routed_experts)


@pytest.mark.parametrize("seed", range(4))
def test_the_popular_experts_are_so_on_all_ranks(seed):
    fields = {"num_tokens": 2000, "ep_size": 4, "seed": seed}
    by_rank = [rows_per_expert(case(routing="zipf:3", n_activated_experts=1, **fields), rank) for rank in range(4)]
    assert len({int(rows.argmax()) for rows in by_rank}) == 1
    for routing in ("empty", "one-hot"):
        empty = {tuple((rows_per_expert(case(routing=routing, **fields), r) == 0).tolist()) for r in range(4)}
        assert len(empty) == 1
        assert any(empty.pop())


def test_no_two_ranks_have_a_tensor_in_common():
    one = case(num_tokens=64, ep_size=4)
    inputs = [make_inputs(one, CPU, rank) for rank in range(4)]
    parameters = [make_parameters(one, CPU, rank) for rank in range(4)]
    for a in range(4):
        for b in range(a):
            for name in ("x_TD", "token_mask_T", "weights_TK", "indices_TK", "grad_TD"):
                assert not torch.equal(getattr(inputs[a], name).nan_to_num(), getattr(inputs[b], name).nan_to_num())
            for name, parameter in parameters[a].items():
                assert not torch.equal(parameter, parameters[b][name])


def test_a_rank_has_its_share_of_the_experts_drawn_as_those_of_one_process():
    one = case(ep_size=4, dim=128, moe_inter_dim=64)
    whole = make_parameters(case(ep_size=1, dim=128, moe_inter_dim=64), CPU)
    for rank in range(4):
        for name, share in make_parameters(one, CPU, rank).items():
            assert share.shape == (2, *whole[name].shape[1:])
            assert float(share.std()) == pytest.approx(float(whole[name].std()), rel=0.25)
