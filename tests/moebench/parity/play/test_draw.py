"""The lines that draw a trial's tensors give the values, dtypes and layouts that the trial names."""

from dataclasses import replace

import pytest
import torch

from moebench.parity.play import draw
from moebench.parity.space.trial import AXES, Trial

CPU = torch.device("cpu")
TRIAL = Trial(num_tokens=9, n_routed_experts=6, n_activated_experts=3, dim=8, moe_inter_dim=4, seed=3)


def drawn(number=0, tokens=None, **fields):
    return draw.run_lines(draw.input_lines(replace(TRIAL, **fields), number, tokens), CPU)


def test_shapes_and_dtypes_are_those_of_the_trial():
    one = drawn(dtype="bfloat16", weights_dtype="float64", index_dtype="int16")
    assert (one.x_TD.shape, one.weights_TK.shape, one.token_mask_T.shape) == ((9, 8), (9, 3), (9,))
    tensors = (one.x_TD, one.grad_TD, one.weights_TK, one.indices_TK, one.token_mask_T)
    names = (torch.bfloat16, torch.bfloat16, torch.float64, torch.int16, torch.bool)
    assert tuple(tensor.dtype for tensor in tensors) == names


def test_the_same_lines_give_the_same_values_and_other_numbers_others():
    assert torch.equal(drawn().x_TD, drawn().x_TD)
    assert not torch.equal(drawn().x_TD, drawn(1).x_TD)
    assert drawn(tokens=4).x_TD.shape == (4, 8)


def test_drawing_leaves_torchs_generator_as_it_was():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    drawn()
    draw.parameters(TRIAL, draw.shapes(TRIAL), 0, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("routing", AXES["routing"])
def test_a_token_chooses_different_experts_that_exist(routing):
    indices = drawn(routing=routing, num_tokens=40).indices_TK
    assert indices.min() >= 0
    assert indices.max() < 6
    assert all(len(set(row)) == 3 for row in indices.tolist())


def test_routings_spread_tokens_as_they_say():
    def used(routing):
        return drawn(routing=routing, num_tokens=40).indices_TK.unique().tolist()

    assert (used("first"), used("last"), len(used("one-hot"))) == ([0, 1, 2], [3, 4, 5], 3)
    assert used("half-empty") == [0, 2, 4]
    counts = drawn(routing="zipf", num_tokens=200).indices_TK.flatten().bincount(minlength=6)
    assert counts[0] > 2 * counts[5]
    blocks = drawn(routing="blocks", num_tokens=40).indices_TK
    assert (blocks[1:] == blocks[:-1]).all(dim=1).sum() >= 30


def test_choices_that_are_dropped_or_repeated():
    assert (drawn(choices="first-dropped").indices_TK[:, 0] == -1).all()
    assert (drawn(choices="token-dropped").indices_TK[-1] == -1).all()
    assert (drawn(choices="all-dropped").indices_TK == -1).all()
    assert 0 < (drawn(choices="some-dropped", num_tokens=40).indices_TK == -1).sum() < 60
    repeated = drawn(choices="duplicates").indices_TK
    assert torch.equal(repeated[:, -1], repeated[:, 0])


def test_masked_tokens_have_nan_and_no_other_token_has():
    for mask, kept in {"none-kept": 0, "only-first": 1, "only-last": 1, "first-masked": 8, "last-masked": 8}.items():
        one = drawn(mask=mask)
        assert int(one.token_mask_T.sum()) == kept, mask
        assert torch.equal(one.x_TD.isnan().any(dim=1), ~one.token_mask_T)
    assert drawn(mask="only-last").token_mask_T[-1]


def test_routing_weights_that_nobody_uses_may_be_nan():
    one = drawn(mask="some", choices="some-dropped", unused_weights="nan", num_tokens=40)
    unused = (one.indices_TK < 0) | ~one.token_mask_T.unsqueeze(-1)
    assert unused.any()
    assert torch.equal(one.weights_TK.isnan(), unused)


def test_kinds_of_routing_weights():
    torch.testing.assert_close(drawn(weights="sum-to-one").weights_TK.sum(dim=1), torch.ones(9))
    assert (drawn(weights="all-zero").weights_TK == 0).all()
    zeros = drawn(weights="some-zero", num_tokens=40).weights_TK == 0
    assert 0 < zeros.sum() < zeros.numel()
    assert drawn(weights="negative", num_tokens=40).weights_TK.min() < -1
    assert drawn(weights="to-eight", num_tokens=40).weights_TK.max() > 7
    assert set(drawn(weights="near-one", num_tokens=40).weights_TK.unique().tolist()) == {
        1.0,
        float(torch.tensor(1 - 1e-4)),
    }


def test_a_gradient_of_halves_cancels():
    grad = drawn(grad="halves", num_tokens=40).grad_TD
    assert (grad[:20] == 1).all()
    assert (grad[20:] == -1).all()


LAYOUTS = {
    "strided": lambda one: one.stride(1) == 2,
    "columns": lambda one: one.stride(0) == 1,
    "sliced": lambda one: one.stride(0) > one.shape[1] and one.stride(1) == 1,
    "misaligned": lambda one: one.storage_offset() == 1,
    "expanded": lambda one: one.stride(0) == 0,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("axis", "name"), [("x", "x_TD"), ("weights", "weights_TK"), ("grad", "grad_TD")])
def test_a_layout_has_the_same_values_in_other_places(axis, name, layout):
    plain, found = getattr(drawn(), name), getattr(drawn(**{f"{axis}_layout": layout}), name)
    assert LAYOUTS[layout](found)
    assert torch.equal(found, plain[:1].expand(plain.shape) if layout == "expanded" else plain)
    if layout in ("strided", "sliced"):  # what lies in between must not be read
        memory = found.as_strided((found.untyped_storage().nbytes() // found.itemsize,), (1,), 0)
        assert int(memory.isnan().sum()) == len(memory) - found.numel()


def test_parameters_have_the_shapes_of_the_layer_and_the_dtype_of_the_trial():
    trial = replace(TRIAL, expert_bias=True, param_dtype="float16")
    found = draw.parameters(trial, draw.shapes(trial), 0, CPU)
    assert {name: tuple(one.shape) for name, one in found.items()} == {
        "gate_and_up_projs": (6, 8, 8), "down_projs": (6, 4, 8), "gate_up_proj_bias": (6, 8), "down_proj_bias": (6, 8),
    }  # fmt: skip
    assert {one.dtype for one in found.values()} == {torch.float16}
    assert draw.shapes(replace(trial, expert_activation="relu2"))["gate_and_up_projs"] == (6, 8, 4)


@pytest.mark.parametrize("layout", AXES["parameter_layout"])
def test_a_parameter_keeps_its_values_in_every_layout(layout):
    trial = replace(TRIAL, parameter_layout=layout)
    stacked = torch.randn(6, 8, 4)
    found = draw.laid_out(trial, torch.nn.Parameter(stacked.clone()))
    assert torch.equal(found, stacked)
    assert (found.storage_offset() == 1) == (layout == "misaligned")
    assert found.is_contiguous() == (layout != "columns")


def test_wanted_names_the_tensors_that_require_a_gradient():
    names = tuple(draw.shapes(replace(TRIAL, expert_bias=True)))

    def of(kind, is_last=True):
        return draw.wanted(replace(TRIAL, wanted=kind), names, is_last).names

    assert of("all") == ("x", "weights", *names)
    assert of("nothing") == ()
    assert of("x+weights") == ("x", "weights")
    assert of("biases") == names[2:]
    assert of("all-but-x") == ("weights", *names)
    assert of("parameters") == of("parameters-on-last") == names
    assert of("parameters-on-last", is_last=False) == of("all")
