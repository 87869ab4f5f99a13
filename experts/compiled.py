"""Compute the local experts as one operator of torch, so that torch.compile makes one graph of the code around a layer.

torch's compiler does not look into the operators. If it traced the engines, it would break the graph: it cannot trace
this package's Triton kernels, the loop's rows depend on the routing, and torch's fake grouped_mm refuses float32 and
float16 (torch 2.13). A traced loop over 4 experts took over a minute to compile (CPU, 2026-11-29). With the operators,
a compiled layer runs the same kernels as a layer without the compiler, and gives the same bits.

`compute` is for every engine. In backward, it computes forward again. `compute_and_keep` is for an engine with
`Engine.own_products`, if autograd needs a gradient. It keeps for backward what the engine keeps without the compiler.
Only compiled layers use the operators: a call of one takes tens of microseconds, which a forward of few tokens feels.

An operator takes only tensors and plain values. So an engine is given by its name, and a configuration as text.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from experts.autocast import autocast_off
from experts.compute import Engine, ExpertParameters
from experts.compute.whole import Plan, Wanted, run_backward, run_forward
from experts.config import MoEConfig, dtype_name
from experts.engines import get_engine
from experts.errors import Unsupported
from experts.layer import check_indices
from experts.permutation import Permutation, sort_by_expert

#: The inputs of an operator that may get gradients: x, weights and the four parameters.
NUM_DIFFERENTIABLE = 6


def described(config: MoEConfig) -> str:
    """Return the configuration as text, for `compute_local`."""
    return json.dumps({**dataclasses.asdict(config), "dtype": dtype_name(config.dtype)})


def compute_local(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    parameters: ExpertParameters,
    engine: str,
    config: str,
    first: int,
    save: str | None,
    keep: bool,
) -> Tensor:
    """Return what the engine's `Compute` returns, by an operator that torch's compiler does not look into.

    `config` is what `described` returned. `keep` is whether the engine has `own_products`. When the operator runs, it
    raises InputError for wrong indices on a CPU, and Unsupported if the engine cannot run.
    """
    tensors = x_TD, weights_TK, *parameters.to(x_TD.dtype)
    given = *tensors, indices_TK, engine, config, first, save
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    result: Tensor = compute_and_keep(*given)[0] if wanted and keep else compute(*given)
    return result


@functools.cache
def config_of(text: str) -> MoEConfig:
    return MoEConfig(**json.loads(text))


def checked(engine: str, config: MoEConfig, x_TD: Tensor, indices_TK: Tensor) -> Engine:
    """Return the engine, after the checks that a layer without the compiler makes before it dispatches."""
    check_indices(indices_TK, config.n_routed_experts)
    found = get_engine(engine)
    reason = found.unsupported(x_TD.device, config.with_dtype(x_TD.dtype))
    if reason is not None:
        raise Unsupported(f"{engine}: {reason.reason}")
    return found


def _engines_result(
    tensors: tuple[Any, ...], indices_TK: Tensor, engine: str, config: str, first: int, save: str | None
) -> Tensor:
    x_TD, weights_TK, *parameters = tensors
    settings = config_of(config)
    found = checked(engine, settings, x_TD, indices_TK)
    options = {} if save is None else {"save": save}
    with autocast_off(x_TD):
        return found.compute(
            x_TD, weights_TK, indices_TK, ExpertParameters(*parameters), settings, first, **options
        ).contiguous()


def gradients(found: list[Tensor | None], like: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Return contiguous gradients. An operator cannot return None: an empty tensor stands for no gradient."""
    x_TD = like[0]
    assert x_TD is not None
    return [x_TD.new_empty(0) if grad is None else grad.contiguous() for grad in found]


def fake_gradients(tensors: tuple[Tensor | None, ...], wanted: list[bool]) -> list[Tensor]:
    x_TD = tensors[0]
    assert x_TD is not None
    pairs = zip(tensors, wanted, strict=True)
    return [t.new_empty(t.shape) if t is not None and wants else x_TD.new_empty(0) for t, wants in pairs]


def for_autograd(grads: list[Tensor], wanted: list[bool], num_inputs: int) -> tuple[Tensor | None, ...]:
    """Return one value for each input of an operator."""
    found = tuple(grad if wants else None for grad, wants in zip(grads, wanted, strict=True))
    return found + (None,) * (num_inputs - len(found))


@contextlib.contextmanager
def with_autograd() -> Iterator[None]:
    """Let autograd work inside of an operator. torch calls operators with the dispatch keys of autograd left out.

    The loop and the eager steps get gradients from autograd. They would raise that no tensor requires a gradient.
    """
    with torch._C._PreserveDispatchKeyGuard():
        for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


@torch.library.custom_op("experts::compute", mutates_args=())
def compute(
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
) -> Tensor:
    """Return the local experts' sum [T, D] in x's dtype, without autograd. The parameters have x's dtype."""
    tensors = x_TD, weights_TK, gate_and_up, down, up_bias, down_bias
    return _engines_result(tensors, indices_TK, engine, config, first, save)


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
    indices_TK: Tensor,
    engine: str,
    config: str,
    first: int,
    save: str | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Compute `compute` again with autograd, and return the wanted gradients of its first six inputs."""
    given = x_TD, weights_TK, gate_and_up, down, up_bias, down_bias
    tensors = tuple(None if t is None else t.detach().requires_grad_(w) for t, w in zip(given, wanted, strict=True))
    asked = [tensor for tensor, wants in zip(tensors, wanted, strict=True) if tensor is not None and wants]
    with with_autograd(), torch.enable_grad():
        output_TD = _engines_result(tensors, indices_TK, engine, config, first, save)
        grads = iter(torch.autograd.grad(output_TD, asked, grad_TD))
    return gradients([next(grads) if wants else None for wants in wanted], tensors)


@compute_again.register_fake
def _(grad_TD: Tensor, *given: Any) -> list[Tensor]:
    return fake_gradients(given[:NUM_DIFFERENTIABLE], given[-1])


def _set_up_compute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.engine, ctx.config, ctx.first, ctx.save = inputs
    ctx.save_for_backward(*tensors)


def _compute_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
    settings = ctx.engine, ctx.config, ctx.first, ctx.save
    grads = compute_again(grad_TD, *ctx.saved_tensors, *settings, wanted)
    return for_autograd(grads, wanted, len(ctx.needs_input_grad))


compute.register_autograd(_compute_backward, setup_context=_set_up_compute)


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
