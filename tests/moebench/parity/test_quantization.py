"""The exact values that FP8 recipes round to, by block and by tensor, forward and in gradients; and the error it adds.

A product with the identity gives back its other operand as the recipe quantised it: the identity itself is exact.
"""

import pytest
import torch

from moebench.parity.quantization import RECIPES, fp8_product

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BY_BLOCK = ("block", "mxfp8")
OWN = ("block_float32", "block_float32_e5m2")
BY_TENSOR = ("current", "delayed")


def finite(fmt):
    """Return every number of the format, as [1, N] in float32."""
    values = torch.arange(256, dtype=torch.uint8).view(fmt).float()
    return values[values.isfinite()].unsqueeze(0)


def rows_kept(values, recipe):
    """Return an activation as the recipe keeps it."""
    return fp8_product(recipe)(values, torch.eye(values.shape[1]))


def matrix_kept(values, recipe):
    """Return a weight as the recipe keeps it."""
    return fp8_product(recipe)(torch.eye(values.shape[0]), values)


def grad_kept(grad, recipe):
    """Return a gradient [N, Q] as the recipe keeps it: the gradient of `a` in a @ identity."""
    a = torch.ones_like(grad).requires_grad_()
    fp8_product(recipe)(a, torch.eye(grad.shape[1])).backward(grad)
    return a.grad


def grad_kept_for_weights(grad, recipe):
    """Return a gradient as the recipe keeps it for the weights' gradient: the gradient of `b` in identity @ b."""
    b = torch.ones_like(grad).requires_grad_()
    fp8_product(recipe)(torch.eye(grad.shape[0]), b).backward(grad)
    return b.grad


def rows_kept_for_weights(values, recipe):
    """Return an activation as the recipe keeps it for the weights' gradient.

    That gradient is the activation's transpose times the output's gradient.
    """
    b = torch.ones(values.shape[1], values.shape[0], requires_grad=True)
    fp8_product(recipe)(values, b).backward(torch.eye(values.shape[0]))
    return b.grad.t()


FORWARD = (rows_kept, matrix_kept, rows_kept_for_weights)
BACKWARD = (grad_kept, grad_kept_for_weights)
#: What is kept in the forward pass, and the recipe. In the recipes of this package, a single row has a scale of its own
#: for each of its columns where gradients of weights are computed, so that nothing is rounded.
IN_BLOCKS = [
    *((kept, recipe) for kept in FORWARD for recipe in (*BY_TENSOR, *BY_BLOCK)),
    *((kept, recipe) for kept in (rows_kept, matrix_kept) for recipe in OWN),
]


# exact values


@pytest.mark.parametrize("exponent", [-40, -1, 0, 7, 30])
@pytest.mark.parametrize(("kept", "recipe"), IN_BLOCKS)
def test_what_e4m3_can_hold_passes_unchanged_at_any_power_of_two(kept, recipe, exponent):
    values = finite(E4M3)
    if recipe in BY_BLOCK:  # so that every block contains the format's largest number
        values = values[values.abs() >= 1].unsqueeze(0)
        values = torch.stack([values[0], torch.full_like(values[0], 448.0)], dim=1).reshape(1, -1)
    values = values * 2.0**exponent
    assert torch.equal(kept(values, recipe), values)


@pytest.mark.parametrize("exponent", [-40, 0, 30])
@pytest.mark.parametrize("recipe", BY_TENSOR)
@pytest.mark.parametrize("kept", BACKWARD)
def test_gradients_scaled_by_tensor_are_e5m2(kept, recipe, exponent):
    values = finite(E5M2) * 2.0**exponent
    assert torch.equal(kept(values, recipe), values)
    # E4M3 has the number 18; in E5M2, 18 is as far from 16 as from 20
    between = torch.tensor([[448.0, 18.0, -22.0]]) * 2.0**exponent
    assert torch.equal(kept(between, recipe), torch.tensor([[448.0, 16.0, -24.0]]) * 2.0**exponent)


@pytest.mark.parametrize("recipe", BY_BLOCK)
@pytest.mark.parametrize("kept", BACKWARD)
def test_gradients_scaled_by_block_are_e4m3(kept, recipe):
    values = torch.tensor([[448.0, 18.0, -22.0, 17.0, 19.0]])
    assert torch.equal(kept(values, recipe), torch.tensor([[448.0, 18.0, -22.0, 16.0, 20.0]]))


@pytest.mark.parametrize(("kept", "recipe"), IN_BLOCKS)
def test_numbers_between_go_to_the_nearest_and_halves_to_the_even(kept, recipe):
    values = torch.tensor([[448.0, 17.0, 17.01, 18.99, 19.0, -21.1]])
    assert torch.equal(kept(values, recipe), torch.tensor([[448.0, 16.0, 18.0, 18.0, 20.0, -22.0]]))


def test_the_scale_of_a_tensor_takes_its_largest_to_the_formats_that_of_a_block_is_a_power_of_two():
    """For 1 and 3, a scale by tensor maps 1 to 149⅓, between 144 and 160. A scale by block maps it to 128."""
    values = torch.tensor([[1.0, 3.0]])
    for recipe in (*BY_TENSOR, *OWN):
        torch.testing.assert_close(rows_kept(values, recipe), torch.tensor([[144 / (448 / 3), 3.0]]), rtol=1e-6, atol=0)
    for recipe in BY_BLOCK:
        assert torch.equal(rows_kept(values, recipe), values)


# which values share a scale

LARGE = 2.0**40
#: Their ratios to LARGE are far below E4M3's least, 2^-9 / 448: one scale for both rounds these values to zero.
SMALL = torch.tensor([3.0, -5.0, 7.5, 11.0]).repeat(160).reshape(1, -1)


def with_one_large(values, row, column):
    values = values.clone()
    values[row, column] = LARGE
    return values


@pytest.mark.parametrize("recipe", ["block", "block_float32", "block_float32_16bit_dw"])
@pytest.mark.parametrize("kept", [rows_kept, grad_kept])
def test_a_large_value_disturbs_its_own_1_by_128_and_nothing_else(kept, recipe):
    # 448 / 64 is the largest value, so that the float32 scale is exact
    values = torch.tensor([7.0, -3.5, 0.875, 1.75]).repeat(96).reshape(1, -1).repeat(3, 1)
    found = kept(with_one_large(values, 1, 130), recipe)
    expected = values.clone()
    expected[1, 128:256] = 0
    expected[1, 130] = LARGE
    assert torch.equal(found, expected)
    if recipe != "block":
        return
    by_tensor = kept(with_one_large(values, 1, 130), "current")
    assert torch.equal(by_tensor, with_one_large(torch.zeros_like(values), 1, 130))


@pytest.mark.parametrize("kept", [rows_kept_for_weights, grad_kept_for_weights])
def test_for_the_gradient_of_weights_blocks_run_over_the_rows(kept):
    """The product for the weights' gradient sums over tokens."""
    values = SMALL[:, :300].t().repeat(1, 3)
    found = kept(with_one_large(values, 130, 1), "block")
    expected = values.clone()
    expected[128:256, 1] = 0
    expected[130, 1] = LARGE
    assert torch.equal(found, expected)


def test_own_recipes_have_smaller_blocks_for_activations_than_for_gradients_in_the_gradient_of_weights():
    values = torch.full((300, 300), 448.0)
    one = with_one_large(values, 130, 5)
    expected = one.clone()
    expected[128:256, 5] = 0
    expected[130, 5] = LARGE
    assert torch.equal(rows_kept_for_weights(one, "block_float32"), expected)
    expected[128:256, :128] = 0
    expected[130, 5] = LARGE
    assert torch.equal(grad_kept_for_weights(one, "block_float32"), expected)


def test_gradients_of_weights_in_16_bits_are_not_rounded():
    values = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    for kept in (rows_kept_for_weights, grad_kept_for_weights):
        assert torch.equal(kept(values, "block_float32_16bit_dw"), values)


@pytest.mark.parametrize("recipe", ["block", *OWN])
def test_a_large_weight_disturbs_its_own_128_by_128_and_nothing_else(recipe):
    values = torch.full((300, 300), 448.0)
    found = matrix_kept(with_one_large(values, 130, 5), recipe)
    expected = values.clone()
    expected[128:256, :128] = 0
    expected[130, 5] = LARGE
    assert torch.equal(found, expected)


def test_mxfp8_has_blocks_of_32_along_the_reduction():
    values = SMALL[:, :96].repeat(96, 1)
    for kept, block in ((rows_kept, (slice(40, 41), slice(32, 64))), (matrix_kept, (slice(32, 64), slice(40, 41)))):
        expected = values.clone()
        expected[block] = 0
        expected[40, 40] = LARGE
        assert torch.equal(kept(with_one_large(values, 40, 40), "mxfp8"), expected)


@pytest.mark.parametrize("recipe", BY_BLOCK)
@pytest.mark.parametrize("kept", FORWARD + BACKWARD)
def test_a_block_at_the_edge_is_a_smaller_one(kept, recipe):
    """The result is as if zeros filled the block up."""
    values = torch.randn(130, 200, generator=torch.Generator().manual_seed(0))
    values[128:] *= 1e-9
    values[:, 192:] *= 1e-9
    padded = torch.zeros(256, 256)
    padded[:130, :200] = values
    assert torch.equal(kept(values, recipe), kept(padded, recipe)[:130, :200])


# zeros and tiny values


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kept", FORWARD + BACKWARD)
def test_zeros_stay_zeros(kept, recipe):
    """The values fill a tensor, or one block of it, as in the gradient of a clamped activation of few tokens."""
    assert torch.equal(kept(torch.zeros(3, 300), recipe), torch.zeros(3, 300))
    one = with_one_large(torch.zeros(300, 300), 1, 130)
    assert torch.equal(kept(one, recipe), one)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kept", FORWARD + BACKWARD)
def test_the_smallest_normal_numbers_of_float32_are_numbers_like_others(kept, recipe):
    values = torch.tensor([[1.0, -3.0, 2.0, 1.5]]) * 2.0**-124
    torch.testing.assert_close(kept(values, recipe), values, rtol=0.07, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_rows_give_no_rows_and_gradients_of_zeros(recipe):
    a, b = torch.zeros(0, 130, requires_grad=True), torch.randn(130, 40, requires_grad=True)
    result = fp8_product(recipe)(a, b)
    result.backward(torch.zeros(0, 40))
    assert result.shape == (0, 40)
    assert a.grad.shape == (0, 130)
    assert torch.equal(b.grad, torch.zeros(130, 40))


# how large the rounding error is


def relative_errors(recipe, dtype=torch.float32):
    """Return the errors, against float64, of a product of Gaussian operands and of both gradients."""
    generator = torch.Generator().manual_seed(1)
    a, b, grad = (torch.randn(size, generator=generator).to(dtype) for size in ((256, 384), (384, 320), (256, 320)))
    exact = a.double() @ b.double(), grad.double() @ b.double().t(), a.double().t() @ grad.double()
    a, b = a.requires_grad_(), b.requires_grad_()
    result = fp8_product(recipe)(a, b)
    result.backward(grad)
    found = result.detach(), a.grad, b.grad
    assert {tensor.dtype for tensor in found} == {dtype}
    return [float((one - right).norm() / right.norm()) for one, right in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("recipe", "forward", "gradient"),
    [
        *(("current", 0.0375, 0.059), ("delayed", 0.0375, 0.059), ("block", 0.0375, 0.0375), ("mxfp8", 0.0375, 0.0375)),
        *(("block_float32", 0.0375, 0.0375), ("block_float32_e5m2", 0.0375, 0.0578)),
    ],
)
def test_the_error_is_that_of_two_operands_rounded_to_three_bits_or_two(recipe, forward, gradient, dtype):
    """A Gaussian rounded to E4M3 errs by 2.65% of its size, to E5M2 by twice that. Two errors add in squares."""
    assert relative_errors(recipe, dtype) == pytest.approx([forward, gradient, gradient], rel=0.03)


def test_gradients_of_weights_in_16_bits_have_the_error_of_their_dtype():
    _, _, float32 = relative_errors("block_float32_16bit_dw")
    _, of_rows, bfloat16 = relative_errors("block_float32_16bit_dw", torch.bfloat16)
    assert (float32 < 1e-6, bfloat16 < 3e-3) == (True, True)
    assert of_rows == pytest.approx(0.0375, rel=0.03)


def test_an_unknown_recipe_is_told_those_there_are():
    with pytest.raises(ValueError, match=r"'e4m3'.*must be one of current, delayed, block, mxfp8"):
        fp8_product("e4m3")


@pytest.mark.parametrize("recipe", ["block", *OWN])
def test_halves_have_blocks_of_their_own_in_the_recipes_of_this_package(recipe):
    """A large value in the one half leaves the other half as it is, in a weight and in gradients."""
    b = torch.full((3, 20), 7.0)
    b[0, 2] = LARGE
    b.requires_grad_()
    a = torch.eye(3, requires_grad=True)
    found = fp8_product(recipe, (3, 20))(a, b)
    right = torch.full((3, 10), 7.0 if recipe in OWN else 0.0)
    assert torch.equal(found[:, 10:], right)
    assert torch.equal(fp8_product(recipe)(a, b)[:, 10:], torch.zeros(3, 10))
