"""Compute the local experts with adapters as one operator of torch; see `experts.compiled`.

In backward, the operator computes forward again, with every engine.
"""

from typing import Any

import torch
from torch import Tensor

from experts.autocast import autocast_off
from experts.compiled import checked, config_of, fake_gradients, for_autograd, gradients, with_autograd
from experts.compute import Adapters, ExpertParameters

#: The inputs of the operator that may get gradients: x, weights and the four adapters.
NUM_DIFFERENTIABLE = 6


def compute_local(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    adapters: Adapters,
    engine: str,
    config: str,
    first: int,
) -> Tensor:
    """Return what the engine's `Compute` returns, by an operator that torch's compiler does not look into.

    `config` is what `compiled.described` returned. When the operator runs, it raises InputError for wrong indices on a
    CPU, and Unsupported if the engine cannot run.
    """
    tensors = x_TD, weights_TK, *adapters.to(x_TD.dtype).tensors, *parameters.to(x_TD.dtype)
    result: Tensor = compute_adapted(*tensors, indices_TK, engine, config, first, adapters.scale)
    return result


def _engines_result(
    tensors: tuple[Any, ...], indices_TK: Tensor, engine: str, config: str, first: int, scale: float
) -> Tensor:
    x_TD, weights_TK, *others = tensors
    settings = config_of(config)
    found = checked(engine, settings, x_TD, indices_TK)
    adapters, parameters = Adapters(scale, *others[:4]), ExpertParameters(*others[4:])
    with autocast_off(x_TD):
        output_TD = found.compute(x_TD, weights_TK, indices_TK, parameters, settings, first, adapters=adapters)
        return output_TD.contiguous()


@torch.library.custom_op("experts::compute_adapted", mutates_args=())
def compute_adapted(
    x_TD: Tensor,
    weights_TK: Tensor,
    up_A: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    down_B: Tensor,
    gate_and_up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    indices_TK: Tensor,
    engine: str,
    config: str,
    first: int,
    scale: float,
) -> Tensor:
    """Return the local experts' sum [T, D] in x's dtype, without autograd. All tensors of experts have x's dtype."""
    tensors = x_TD, weights_TK, up_A, up_B, down_A, down_B, gate_and_up, down, up_bias, down_bias
    return _engines_result(tensors, indices_TK, engine, config, first, scale)


@compute_adapted.register_fake
def _(x_TD: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


@torch.library.custom_op("experts::compute_adapted_again", mutates_args=())
def compute_adapted_again(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    up_A: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    down_B: Tensor,
    gate_and_up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    indices_TK: Tensor,
    engine: str,
    config: str,
    first: int,
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Compute `compute_adapted` again with autograd, and return the wanted gradients of its first six inputs."""
    given = x_TD, weights_TK, up_A, up_B, down_A, down_B
    leaves = tuple(tensor.detach().requires_grad_(wants) for tensor, wants in zip(given, wanted, strict=True))
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    tensors = *leaves, gate_and_up, down, up_bias, down_bias
    with with_autograd(), torch.enable_grad():
        output_TD = _engines_result(tensors, indices_TK, engine, config, first, scale)
        grads = iter(torch.autograd.grad(output_TD, asked, grad_TD))
    return gradients([next(grads) if wants else None for wants in wanted], leaves)


@compute_adapted_again.register_fake
def _(grad_TD: Tensor, *given: Any) -> list[Tensor]:
    return fake_gradients(given[:NUM_DIFFERENTIABLE], given[-1])


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.engine, ctx.config, ctx.first, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
    settings = ctx.engine, ctx.config, ctx.first, ctx.scale
    grads = compute_adapted_again(grad_TD, *ctx.saved_tensors, *settings, wanted)
    return for_autograd(grads, wanted, len(ctx.needs_input_grad))


compute_adapted.register_autograd(_backward, setup_context=_set_up)
