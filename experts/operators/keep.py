"""The operator `experts::compute_and_keep`, for engines with `Engine.own_products`.

It keeps for backward what the engine keeps without the compiler.
"""

from typing import Any

import torch
from torch import Tensor

from experts.autocast import autocast_off
from experts.compute import Engine, ExpertParameters
from experts.compute.whole import Plan, Wanted, run_backward, run_forward
from experts.config import MoEConfig
from experts.engines import get_engine
from experts.operators.common import checked, config_of, fake_gradients, for_autograd, gradients, with_autograd
from experts.permutation import Permutation, sort_by_expert

#: The inputs that may get gradients: x, weights and the four parameters.
NUM_DIFFERENTIABLE = 6


@torch.library.custom_op("experts::compute_and_keep", mutates_args=())
def compute_and_keep(
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_and_up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    indices_TK: Tensor,
    engine: str,
    config: str,
    first: int,
    save: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `compute` returns, and what its backward needs: rows, h, and the four tensors of the permutation.

    rows: [N, D] with `save` = "time", else [0, D], because backward takes x; h: [N, H], the up projection.
    """
    settings = config_of(config)
    found = checked(engine, settings, x_TD, indices_TK)
    permutation = sort_by_expert(indices_TK, first, down.shape[0])
    plan = _plan(found, permutation, settings, save)
    with autocast_off(x_TD):
        out_TD, kept = run_forward(
            x_TD, weights_TK, ExpertParameters(gate_and_up, down, up_bias, down_bias), plan, keep=True
        )
    assert kept is not None
    rows, h_NH = kept
    rows = rows.contiguous() if plan.save == "time" else x_TD.new_empty(0, x_TD.shape[1])
    maps = permutation.row_to_slot_N, permutation.slot_to_row_S, permutation.row_to_expert_N, permutation.offsets_L
    return out_TD.contiguous(), rows, h_NH.contiguous(), *maps


@compute_and_keep.register_fake
def _(x_TD: Tensor, weights_TK: Tensor, gate_and_up: Tensor, down: Tensor, *given: Any) -> tuple[Tensor, ...]:
    save = given[-1]
    num_rows = weights_TK.shape[0] * weights_TK.shape[1]
    rows = x_TD.new_empty(num_rows if save == "time" else 0, x_TD.shape[1])
    maps = (x_TD.new_empty(num_rows, dtype=torch.int64) for _ in range(3))
    offsets_L = x_TD.new_empty(down.shape[0], dtype=torch.int32)
    return x_TD.new_empty(x_TD.shape), rows, x_TD.new_empty(num_rows, gate_and_up.shape[2]), *maps, offsets_L


@torch.library.custom_op("experts::compute_backward", mutates_args=())
def compute_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_and_up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    rows: Tensor,
    h_NH: Tensor,
    row_to_slot_N: Tensor,
    slot_to_row_S: Tensor,
    row_to_expert_N: Tensor,
    offsets_L: Tensor,
    engine: str,
    config: str,
    save: str | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the wanted gradients of the first six inputs of `compute_and_keep`, from what it kept."""
    settings = config_of(config)
    permutation = Permutation(row_to_slot_N, slot_to_row_S, row_to_expert_N, offsets_L, weights_TK.shape[1])
    plan = _plan(get_engine(engine), permutation, settings, save)
    parameters = ExpertParameters(gate_and_up, down, up_bias, down_bias)
    with with_autograd(), autocast_off(x_TD):
        # a copy, because h is overwritten: an operator may not write to what autograd keeps for another backward
        tokens, own_h_NH = rows if plan.save == "time" else x_TD, h_NH.clone()
        found = run_backward(grad_TD, tokens, own_h_NH, weights_TK, parameters, plan, Wanted(*wanted))
    return gradients([grad if wants else None for grad, wants in zip(found, wanted, strict=True)], (x_TD,))


@compute_backward.register_fake
def _(grad_TD: Tensor, *given: Any) -> list[Tensor]:
    return fake_gradients(given[:NUM_DIFFERENTIABLE], given[-1])


def _set_up_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.engine, ctx.config, _, ctx.save = inputs[NUM_DIFFERENTIABLE + 1 :]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:NUM_DIFFERENTIABLE], *output[1:])


def _keep_backward(ctx: Any, grad_TD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
    grads = compute_backward(grad_TD, *ctx.saved_tensors, ctx.engine, ctx.config, ctx.save, wanted)
    return for_autograd(grads, wanted, len(ctx.needs_input_grad))


compute_and_keep.register_autograd(_keep_backward, setup_context=_set_up_keep)


def _plan(engine: Engine, permutation: Permutation, config: MoEConfig, save: str | None) -> Plan:
    assert engine.own_products is not None
    return Plan(permutation, config, engine.own_products(permutation, config), "time" if save == "time" else "memory")
