"""The operator `experts::compute`, for every engine and for adapters. In backward, it computes forward again."""

from typing import Any

import torch
from torch import Tensor

from experts.autocast import autocast_off
from experts.compute import Adapters, ExpertParameters
from experts.operators.common import checked, config_of, fake_gradients, for_autograd, gradients, with_autograd

#: The inputs that may get gradients: x, weights, the four parameters and the four adapters.
NUM_DIFFERENTIABLE = 10


def _engines_result(
    tensors: tuple[Any, ...],
    indices_TK: Tensor,
    engine: str,
    config: str,
    first: int,
    save: str | None,
    scale: float,
) -> Tensor:
    x_TD, weights_TK, *others = tensors
    parameters, matrices = ExpertParameters(*others[:4]), others[4:]
    settings = config_of(config)
    found = checked(engine, settings, x_TD, indices_TK)
    options: dict[str, Any] = {} if save is None else {"save": save}
    if matrices[0] is not None:
        options["adapters"] = Adapters(scale, *matrices)
    with autocast_off(x_TD):
        return found.compute(x_TD, weights_TK, indices_TK, parameters, settings, first, **options).contiguous()


@torch.library.custom_op("experts::compute", mutates_args=())
def compute(
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_and_up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_A: Tensor | None,
    up_B: Tensor | None,
    down_A: Tensor | None,
    down_B: Tensor | None,
    indices_TK: Tensor,
    engine: str,
    config: str,
    first: int,
    save: str | None,
    scale: float,
) -> Tensor:
    """Return the local experts' sum [T, D] in x's dtype, without autograd.

    The parameters, and the adapters if there are any, have x's dtype. `scale` is that of the adapters.
    """
    tensors = x_TD, weights_TK, gate_and_up, down, up_bias, down_bias, up_A, up_B, down_A, down_B
    return _engines_result(tensors, indices_TK, engine, config, first, save, scale)


@compute.register_fake
def _(x_TD: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


@torch.library.custom_op("experts::compute_again", mutates_args=())
def compute_again(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_and_up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_A: Tensor | None,
    up_B: Tensor | None,
    down_A: Tensor | None,
    down_B: Tensor | None,
    indices_TK: Tensor,
    engine: str,
    config: str,
    first: int,
    save: str | None,
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Compute `compute` again with autograd, and return the wanted gradients of its first ten inputs."""
    given = x_TD, weights_TK, gate_and_up, down, up_bias, down_bias, up_A, up_B, down_A, down_B
    tensors = tuple(None if t is None else t.detach().requires_grad_(w) for t, w in zip(given, wanted, strict=True))
    asked = [tensor for tensor, wants in zip(tensors, wanted, strict=True) if tensor is not None and wants]
    with with_autograd(), torch.enable_grad():
        output_TD = _engines_result(tensors, indices_TK, engine, config, first, save, scale)
        grads = iter(torch.autograd.grad(output_TD, asked, grad_TD))
    return gradients([next(grads) if wants else None for wants in wanted], tensors)


@compute_again.register_fake
def _(grad_TD: Tensor, *given: Any) -> list[Tensor]:
    return fake_gradients(given[:NUM_DIFFERENTIABLE], given[-1])


def _set_up_compute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.engine, ctx.config, ctx.first, ctx.save, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _compute_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
    settings = ctx.engine, ctx.config, ctx.first, ctx.save, ctx.scale
    grads = compute_again(grad_TD, *ctx.saved_tensors, *settings, wanted)
    return for_autograd(grads, wanted, len(ctx.needs_input_grad))


compute.register_autograd(_compute_backward, setup_context=_set_up_compute)
