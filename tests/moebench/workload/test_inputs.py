"""Inputs depend only on the case: on its seed, on the routing it names, and on the masking it states."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from moebench.errors import InputsError
from moebench.workload.case import Case
from moebench.workload.inputs import make_inputs, make_parameters

CPU = torch.device("cpu")
FIELDS = ("x_TD", "token_mask_T", "weights_TK", "indices_TK", "grad_TD")
DRAWN = ("uniform", "zipf", "zipf:2.5", "balanced", "one-hot", "empty", "empty:0.9")


def case(**fields):
    shape = {"num_tokens": 400, "n_routed_experts": 16, "n_activated_experts": 4, "dim": 8, "moe_inter_dim": 4}
    return Case.model_validate({**shape, "dtype": "float32", **fields})


def rows_per_expert(one):
    return make_inputs(one, CPU).indices_TK.flatten().bincount(minlength=one.n_routed_experts)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_same_seed_gives_the_same_tensors_and_another_seed_others(dtype):
    one = case(dtype=dtype, expert_bias=True, masked_share=0.3)
    same, again, other = (make_inputs(c, CPU) for c in (one, one, one.model_copy(update={"seed": 1})))
    for name in FIELDS:
        tensors = [getattr(inputs, name) for inputs in (same, again, other)]
        torch.testing.assert_close(tensors[0], tensors[1], rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(tensors[0], tensors[2])
    same, again, other = (make_parameters(c, CPU) for c in (one, one, one.model_copy(update={"seed": 1})))
    for name, parameter in same.items():
        assert torch.equal(parameter, again[name])
        assert not torch.equal(parameter, other[name])


def test_inputs_have_the_cases_dtypes_and_shapes():
    for dtype, weights_dtype in (("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")):
        inputs = make_inputs(case(dtype=dtype), CPU)
        dtypes = [str(getattr(inputs, name).dtype).removeprefix("torch.") for name in FIELDS]
        assert dtypes == [dtype, "bool", weights_dtype, "int64", dtype]
        shapes = [tuple(getattr(inputs, name).shape) for name in FIELDS]
        assert shapes == [(400, 8), (400,), (400, 4), (400, 4), (400, 8)]
        assert all(getattr(inputs, name).is_contiguous() for name in FIELDS)
        torch.testing.assert_close(inputs.weights_TK.sum(dim=1), torch.ones_like(inputs.weights_TK[:, 0]))
        assert inputs.weights_TK.min() > 0


def test_nothing_that_is_compared_can_hide_in_zeros():
    """Biases and output gradients are far from zero, and values between the projections are of similar size."""
    one = case(expert_bias=True)
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        assert 0.3 < make_parameters(one, CPU)[name].std() < 0.7
    assert 0.9 < make_inputs(one, CPU).grad_TD.std() < 1.1
    wide = case(dim=256, moe_inter_dim=128)
    assert 0.9 < (make_inputs(wide, CPU).x_TD @ make_parameters(wide, CPU)["gate_and_up_projs"][3]).std() < 1.1


def test_the_batch_does_not_decide_the_weights():
    one, other = case(), case(num_tokens=3, routing="balanced", mode="train", masked_share=0.5)
    for name, parameter in make_parameters(one, CPU).items():
        assert torch.equal(parameter, make_parameters(other, CPU)[name])


@pytest.mark.parametrize("routing", DRAWN)
@pytest.mark.parametrize("chosen", [1, 4, 16])
def test_the_experts_of_a_token_are_distinct_and_there(routing, chosen):
    for seed in range(3):
        one = case(routing=routing, n_activated_experts=chosen, seed=seed)
        indices = make_inputs(one, CPU).indices_TK
        assert indices.shape == (400, chosen)
        assert (indices.min() >= 0, indices.max() < 16) == (True, True)
        assert (indices.sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("routing", DRAWN)
def test_no_tokens_make_no_rows(routing):
    inputs = make_inputs(case(routing=routing, num_tokens=0), CPU)
    assert inputs.indices_TK.shape == (0, 4)
    assert inputs.x_TD.shape == (0, 8)


def test_uniform_favours_nobody():
    one = case(num_tokens=20_000, n_activated_experts=1)
    rows = rows_per_expert(one)
    expected = 20_000 / 16
    assert ((rows - expected).abs() < 5 * expected**0.5).all()  # five standard deviations of a count
    assert rows.min() != rows.max()


@pytest.mark.parametrize(("routing", "exponent"), [("zipf", 1.0), ("zipf:0.5", 0.5), ("zipf:2.0", 2.0)])
def test_zipf_is_popularity_by_rank(routing, exponent):
    one = case(num_tokens=50_000, n_activated_experts=1, routing=routing)
    rows = rows_per_expert(one).sort(descending=True).values.double()
    popularity = torch.arange(1, 17, dtype=torch.float64) ** -exponent
    expected = 50_000 * popularity / popularity.sum()
    assert ((rows - expected).abs() < 5 * expected.sqrt()).all()


def test_zipf_puts_another_expert_first_for_another_seed():
    fields = {"num_tokens": 2_000, "n_activated_experts": 1, "routing": "zipf:2.0"}
    assert len({int(rows_per_expert(case(**fields, seed=seed)).argmax()) for seed in range(8)}) > 1


@pytest.mark.parametrize(("num_tokens", "chosen"), [(400, 4), (401, 3), (1, 1), (5, 16), (7, 5)])
def test_balanced_differs_by_at_most_one(num_tokens, chosen):
    rows = rows_per_expert(case(routing="balanced", num_tokens=num_tokens, n_activated_experts=chosen))
    assert rows.sum() == num_tokens * chosen
    assert rows.max() - rows.min() <= 1


@pytest.mark.parametrize("chosen", [1, 4, 15])
def test_one_hot_is_the_same_experts_for_every_token(chosen):
    rows = rows_per_expert(case(routing="one-hot", n_activated_experts=chosen))
    assert sorted(rows.tolist()) == [0] * (16 - chosen) + [400] * chosen


@pytest.mark.parametrize(
    ("routing", "chosen", "num_empty"),
    [("empty", 4, 8), ("empty:0.25", 4, 4), ("empty:0.9", 4, 12), ("empty:0.5", 16, 0)],
)
def test_empty_leaves_its_share_of_experts_without_tokens_and_enough_for_one_token(routing, chosen, num_empty):
    rows = rows_per_expert(case(routing=routing, n_activated_experts=chosen))
    assert int((rows == 0).sum()) == num_empty
    busy = rows[rows > 0].double()
    assert busy.min() > 0.5 * busy.mean()


@pytest.mark.parametrize(("share", "num_masked"), [(0.0, 0), (0.25, 100), (0.333, 133), (1.0, 400)])
def test_the_masked_share_is_exact_and_its_rows_are_nan(share, num_masked):
    one = case(masked_share=share)
    inputs = make_inputs(one, CPU)
    assert int((~inputs.token_mask_T).sum()) == num_masked == 400 - one.num_active_tokens
    assert torch.equal(inputs.x_TD.isnan().all(dim=1), ~inputs.token_mask_T)
    assert torch.equal(inputs.x_TD.isnan().any(dim=1), ~inputs.token_mask_T)
    assert inputs.grad_TD.isfinite().all()
    active = inputs.active_indices_TK
    assert torch.equal((active < 0).all(dim=1), ~inputs.token_mask_T)
    assert torch.equal(active[inputs.token_mask_T], inputs.indices_TK[inputs.token_mask_T])


def test_masked_tokens_are_anywhere():
    masked = (~make_inputs(case(masked_share=0.5), CPU).token_mask_T).nonzero().flatten()
    assert masked.min() < 100
    assert masked.max() > 300
    assert masked.diff().max() > 1


def test_a_clone_shares_no_memory():
    inputs = make_inputs(case(masked_share=0.5), CPU)
    clone = inputs.clone()
    for name in FIELDS:
        torch.testing.assert_close(getattr(clone, name), getattr(inputs, name), rtol=0, atol=0, equal_nan=True)
        assert getattr(clone, name).data_ptr() != getattr(inputs, name).data_ptr()


# recorded traces


def trace(path: Path, indices, **fields):
    np.save(path, np.asarray(indices))
    shape = {"num_tokens": 5, "n_routed_experts": 8, "n_activated_experts": 2, "routing": f"trace:{path}"}
    return make_inputs(case(**shape, **fields), CPU).indices_TK


def test_a_trace_is_taken_as_it_is(tmp_path):
    recorded = [[0, 7], [3, 3], [-1, 2], [1, 0], [6, -1]]  # one chooses an expert twice; -1 chooses none
    for dtype in (np.int64, np.int32, np.int16, np.int8):
        assert trace(tmp_path / "a.npy", np.array(recorded, dtype)).tolist() == recorded
    assert trace(tmp_path / "a.npy", np.array(recorded, np.int64)).dtype is torch.int64


def test_a_longer_trace_is_cut_and_a_shorter_one_starts_again(tmp_path):
    recorded = [[0, 1], [2, 3], [4, 5], [6, 7], [1, 2], [3, 4], [5, 6]]
    assert trace(tmp_path / "long.npy", recorded).tolist() == recorded[:5]
    assert trace(tmp_path / "short.npy", recorded[:2]).tolist() == [recorded[row] for row in (0, 1, 0, 1, 0)]


@pytest.mark.parametrize(
    ("recorded", "mistake"),
    [
        (
            np.zeros((5, 3), int),
            r"int64 \[5, 3\], but the case needs integers \[tokens >= 1, n_activated_experts = 2\]",
        ),
        (np.zeros(10, int), r"int64 \[10\], but the case needs"),
        (np.zeros((0, 2), int), r"int64 \[0, 2\], but the case needs"),
        (np.zeros((5, 2)), r"float64 \[5, 2\], but the case needs integers"),
        (np.zeros((5, 2), bool), r"bool \[5, 2\], but the case needs integers"),
        (np.full((5, 2), 8), r"names experts 8 to 8, but the case has 0 to 7"),
        (np.full((5, 2), -2), r"names experts -2 to -2, but the case has 0 to 7"),
        (np.full((5, 2), 2**63, np.uint64), r"the case has 0 to 7"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused(tmp_path, recorded, mistake):
    with pytest.raises(InputsError, match=mistake) as refusal:
        trace(tmp_path / "trace.npy", recorded)
    assert str(tmp_path / "trace.npy") in str(refusal.value)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("how", ["object array", "pickle"])
def test_a_trace_is_never_unpickled(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bomb.npy"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        np.save(path, np.array([[Bomb(), Bomb()]], dtype=object), allow_pickle=True)
    with pytest.raises(InputsError, match=r"give a \.npy file of integer expert indices"):
        make_inputs(case(routing=f"trace:{path}"), CPU)
    assert not (tmp_path / "exploded").exists()


def test_a_trace_that_is_not_there_or_no_array_is_refused(tmp_path):
    (tmp_path / "text.npy").write_text("0 1\n")
    np.savez(tmp_path / "archive", np.zeros((5, 4), int))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    for name in ("missing.npy", "text.npy", "archive.npy"):
        with pytest.raises(InputsError, match=name):
            make_inputs(case(routing=f"trace:{tmp_path / name}"), CPU)


#: Every field of a case at another value, including the fields that weights depend on.
OTHERS = (
    *({"n_routed_experts": 8}, {"n_activated_experts": 2}, {"dim": 16}, {"moe_inter_dim": 8}, {"num_tokens": 3}),
    *({"mode": "train"}, {"dtype": "float64"}, {"model": "olmoe"}, {"expert_bias": True}, {"seed": 1}, {"ep_size": 2}),
    *({"ep_size": 2, "rank_load": "uneven"}, {"masked_share": 0.5}, {"routing": "zipf"}),
    *({"expert_activation": name} for name in ("geglu", "relu2", "quick_geglu", "swigluoai")),
    *({"swiglu_limit": 10.0}, {"activation_limit": 5.0}, {"activation_alpha": 1.0}),
    *(
        {"expert_activation": "quick_geglu", "activation_limit": 5.0},
        {"expert_activation": "geglu", "swiglu_limit": 9.0},
    ),
    *({"apply_router_weight_after_down": True}, {"context": "compile"}, {"context": "fsdp2", "dp_size": 2}),
    {"subject": "block:olmoe"},
)


@pytest.mark.parametrize("fields", OTHERS, ids=str)
def test_cases_with_equal_weights_have_the_same_parameters_to_the_bit_and_others_have_not(fields):
    one, other = case(), case(**fields)
    mine, others = (make_parameters(some, CPU) for some in (one, other))
    are_equal = mine.keys() == others.keys() and all(
        mine[name].dtype == others[name].dtype and torch.equal(mine[name], others[name]) for name in mine
    )
    assert (one.weights == other.weights) == are_equal


def test_an_activation_of_another_gain_has_weights_of_its_own():
    clamped = case(expert_activation="quick_geglu")
    assert clamped.weights != case().weights
    assert clamped.weights == case(expert_activation="swigluoai").weights
    assert case(expert_activation="geglu").weights == case().weights
    names = {name for fields in OTHERS for name in fields}
    assert names == Case.model_fields.keys()
