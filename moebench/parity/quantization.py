"""Compute matrix products with FP8 rounding: quantise the operands as Transformer Engine's recipes do.

For an FP8 backend, the oracle runs with these matrix products. The error of this run is what the recipe costs in
accuracy, and this error sets the budget of the backend. Formats and granularities are those of
transformer_engine.common.recipe (2.20):

* `current` and `delayed` scale a whole tensor by its largest magnitude. Here a tensor is the rows or the matrix of one
  expert. The format is E4M3 in the forward pass and E5M2 for gradients. `delayed` takes its scale from earlier passes
  (forward and backward). If the earlier passes have the same tensors, this scale equals the scale of `current`.
* `block` scales blocks by powers of two, all in E4M3. A block is 1 × 128 values of an activation or gradient, along the
  reduction, or 128 × 128 values of a weight.
* `mxfp8` also scales by powers of two in E4M3. A block is 32 values along the reduction, in every operand.

The recipes of the engine `triton_fp8` are not Transformer Engine's. docs/concepts.md defines them:

* `block_float32` has the blocks of `block`. The scale takes the largest magnitude of a block to the largest number of
  the format, and is a number of float32. In the gradients of weights, which are sums over rows, a block is 128 rows of
  a column of the activation, and 128 rows of 128 columns of the output's gradient.
* `block_float32_e5m2` is the same with gradients of activations in E5M2.
* `block_float32_16bit_dw` is the same as `block_float32`, but the gradients of weights are not in FP8.
* `block_float32_rows` has the products of `block_float32`. Before them, tokens and the output's gradients are quantised
  in blocks of 1 × 128 values, because they travel between ranks so. The gradients of weights and of biases see the
  quantised values (`rows_in_fp8`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moebench.parity.oracle import Product

#: The recipes of the engine `triton_fp8`.
OWN_RECIPES = ("block_float32", "block_float32_e5m2", "block_float32_16bit_dw", "block_float32_rows")
RECIPES = ("current", "delayed", "block", "mxfp8", *OWN_RECIPES)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: The shape of a block that shares a scale: in an activation or gradient, then in a weight. In a recipe that is not in
#: this table, a whole tensor shares a scale.
BLOCKS = {
    "block": ((1, 128), (128, 128)),
    "mxfp8": ((1, 32), (32, 1)),
    **dict.fromkeys(OWN_RECIPES, ((1, 128), (128, 128))),
}
#: The recipes whose scales are powers of two.
POWERS_OF_TWO = ("block", "mxfp8")
#: The recipes whose gradients of activations are in E5M2.
E5M2_GRADIENTS = ("current", "delayed", "block_float32_e5m2")
#: The recipes that multiply unquantised operands for the gradients of weights.
EXACT_WEIGHT_GRADIENTS = ("block_float32_16bit_dw",)
#: The recipes in which rows travel between ranks in FP8.
FP8_ROWS = ("block_float32_rows",)
#: The largest power of two in float32. Zeros would get an infinite scale, and an infinite scale turns zeros into NaN.
LARGEST_SCALE = 2.0**127


def fp8_product(recipe: str, halved: tuple[int, int] | None = None) -> Product:
    """Return a matrix product (a [N, P], b [P, Q]) -> [N, Q] in a's dtype, with the recipe's rounding.

    The product quantises the operands in the forward pass and in both gradients. It also takes stacks of G matrices, a
    [G, N, P] and b [G, P, Q], and quantises each matrix by itself. Raises ValueError if this module does not know the
    recipe's rounding.

    `halved` is the shape of matrices whose columns are two halves, gate and up. In the recipes of `triton_fp8`, each
    half has blocks of its own.
    """
    if recipe not in RECIPES:
        raise ValueError(f"FP8 recipe {recipe!r}: its rounding is not known; it must be one of {', '.join(RECIPES)}")

    def product(a: Tensor, b: Tensor) -> Tensor:
        if a.dim() == 3:
            return torch.stack([product(*pair) for pair in zip(a, b, strict=True)])
        result: Tensor = _Fp8Product.apply(a, b, recipe, 2 if recipe in OWN_RECIPES and tuple(b.shape) == halved else 1)
        return result

    return product


def rows_in_fp8(recipe: str | None) -> Callable[[Tensor], Tensor] | None:
    """Return what rounds rows [..., D] as a recipe does before they travel; None if they travel in their own dtype.

    The rounded rows have the dtype of the rows.
    """
    if recipe not in FP8_ROWS:
        return None
    return lambda rows: _along_rows(rows.flatten(0, -2), recipe, E4M3).view(rows.shape).to(rows.dtype)


class _Fp8Product(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, recipe: str, parts: int) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.recipe, ctx.parts = recipe, parts
        return _multiply(_along_rows(a, recipe, E4M3), _in_parts(_matrix, b, parts, recipe), a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        a, b = ctx.saved_tensors
        recipe, parts = ctx.recipe, ctx.parts
        gradient_format = E5M2 if recipe in E5M2_GRADIENTS else E4M3
        rows = _in_parts(_along_rows, grad, parts, recipe, gradient_format)
        grad_a = _multiply(rows, _in_parts(_matrix, b, parts, recipe).t(), a.dtype)
        if recipe in EXACT_WEIGHT_GRADIENTS:
            return grad_a, _multiply(a.t(), grad, b.dtype), None, None
        # the gradient of a weight is a sum over the rows, so its blocks also lie along the rows
        if recipe in OWN_RECIPES:
            right = _in_parts(_matrix, grad, parts, recipe, gradient_format)
        else:
            right = _along_rows(grad.t(), recipe, gradient_format).t()
        across = _along_rows(a.t(), recipe, E4M3), right
        return grad_a, _multiply(*across, b.dtype), None, None


def _multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a @ b).to(dtype)


def _along_rows(operand: Tensor, recipe: str, fmt: torch.dtype) -> Tensor:
    """Return an activation or gradient after the recipe's rounding, in float32; blocks lie along its last dimension."""
    return _quantised(operand.float(), recipe, 0, fmt)


def _matrix(weight: Tensor, recipe: str, fmt: torch.dtype = E4M3) -> Tensor:
    return _quantised(weight.float(), recipe, 1, fmt)


def _in_parts(quantise: Callable[..., Tensor], operand: Tensor, parts: int, *more: Any) -> Tensor:
    """Quantise parts of the columns, each with blocks of its own."""
    return torch.cat([quantise(part, *more) for part in operand.chunk(parts, dim=1)], dim=1)


def _quantised(values: Tensor, recipe: str, operand: int, fmt: torch.dtype) -> Tensor:
    """Scale by the largest magnitude of the tensor or of each block, round to `fmt`, and scale back.

    `operand` is 0 for an activation or gradient, and 1 for a weight.
    """
    if values.numel() == 0:
        return values
    largest = _block_maxima(values, BLOCKS[recipe][operand]) if recipe in BLOCKS else values.abs().max()
    scale = (torch.finfo(fmt).max / largest).clamp(max=LARGEST_SCALE)
    if recipe in POWERS_OF_TWO:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (values * scale).clamp(-torch.finfo(fmt).max, torch.finfo(fmt).max).to(fmt).float() / scale


def _block_maxima(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Return a tensor in the shape of `values` that has, for each value, the largest magnitude in the value's block.

    Where the shape is not a multiple of `block`, the blocks at the edge are smaller.
    """
    rows, columns = values.shape
    maxima = F.max_pool2d(values.abs()[None], block, stride=block, ceil_mode=True)[0]
    spread = maxima.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return spread[:rows, :columns]
