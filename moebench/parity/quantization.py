"""The rounding of FP8 recipes, emulated: products whose operands are quantised as Transformer Engine's recipes do.

What a recipe costs in accuracy is the budget of a backend that uses it: the loop runs once more with these products.
Formats and granularities are those of transformer_engine.common.recipe (2.20). `current` and `delayed` scale a whole
tensor, here one expert's rows or matrix, by its largest magnitude, in E4M3 forward and E5M2 for gradients; delayed
takes its scale from earlier passes, which on the same tensors is the current one. `block` and `mxfp8` scale pieces by
powers of two, all in E4M3: 1 × 128 of activations and gradients along the reduction and 128 × 128 of weights, and 32
along the reduction of everything.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

RECIPES = ("current", "delayed", "block", "mxfp8")
Product = Callable[[Tensor, Tensor], Tensor]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: What shares a scale: values of an activation or a gradient, and of a weight; a whole tensor where not named.
BLOCKS = {"block": ((1, 128), (128, 128)), "mxfp8": ((1, 32), (32, 1))}
#: The largest power of two in float32: infinite, as zeros would have it, a scale makes NaN of them.
LARGEST_SCALE = 2.0**127


def fp8_product(recipe: str) -> Product:
    """(a [N, P], b [P, Q]) -> [N, Q] in a's dtype, by quantised operands, forward and in both gradients.

    Raises ValueError for a recipe whose rounding is not known here.
    """
    if recipe not in RECIPES:
        raise ValueError(f"FP8 recipe {recipe!r}: its rounding is not known; it must be one of {', '.join(RECIPES)}")

    def product(a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = _Fp8Product.apply(a, b, recipe)
        return result

    return product


class _Fp8Product(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, recipe: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.recipe = recipe
        return _multiply(_along_rows(a, recipe, E4M3), _matrix(b, recipe), a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        recipe = ctx.recipe
        gradient_format = E4M3 if recipe in BLOCKS else E5M2
        grad_a = _multiply(_along_rows(grad, recipe, gradient_format), _matrix(b, recipe).t(), a.dtype)
        # the reduction of a weight's gradient runs over the rows, and so do its blocks
        across = _along_rows(a.t(), recipe, E4M3), _along_rows(grad.t(), recipe, gradient_format).t()
        return grad_a, _multiply(*across, b.dtype), None


def _multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a @ b).to(dtype)


def _along_rows(operand: Tensor, recipe: str, fmt: torch.dtype) -> Tensor:
    """An activation or gradient as its recipe keeps it, in float32; blocks lie along the rows."""
    return _quantised(operand.float(), BLOCKS[recipe][0] if recipe in BLOCKS else None, fmt)


def _matrix(weight: Tensor, recipe: str) -> Tensor:
    return _quantised(weight.float(), BLOCKS[recipe][1] if recipe in BLOCKS else None, E4M3)


def _quantised(values: Tensor, block: tuple[int, int] | None, fmt: torch.dtype) -> Tensor:
    """Scaled by the largest magnitude of the tensor or of each block, rounded to `fmt`, and scaled back."""
    if values.numel() == 0:
        return values
    largest = values.abs().max() if block is None else _block_maxima(values, block)
    scale = (torch.finfo(fmt).max / largest).clamp(max=LARGEST_SCALE)
    if block is not None:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (values * scale).clamp(-torch.finfo(fmt).max, torch.finfo(fmt).max).to(fmt).float() / scale


def _block_maxima(values: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each value's block, in the values' shape; edge blocks are smaller."""
    rows, columns = values.shape
    maxima = F.max_pool2d(values.abs()[None], block, stride=block, ceil_mode=True)[0]
    spread = maxima.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return spread[:rows, :columns]
