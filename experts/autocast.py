"""Keep `torch.autocast` out of the layers, which compute in x's dtype.

Autocast applies to the operators that run inside of it. So it also applies to the operators of a backward pass that is
started inside of it.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

P = ParamSpec("P")
R = TypeVar("R")


def autocast_off(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autocast is off for the tensor's device.

    The compiler of torch 2.11 cannot trace the question. The operators of a compiled layer (`experts.compiled`) turn
    autocast off themselves.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()  # it costs less to enter


def without_autocast(backward: Callable[P, R]) -> Callable[P, R]:
    """Decorate the backward of a `torch.autograd.Function`, so that autocast is off in it."""

    @functools.wraps(backward)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        grad = args[1]  # after the context
        assert isinstance(grad, Tensor)
        with autocast_off(grad):
            return backward(*args, **kwargs)

    return wrapped


def product(a_NP: Tensor, b_PQ: Tensor) -> Tensor:
    """Return the matrix product a @ b [N, Q]. Autocast is off in its backward, which can be differentiated again."""
    result: Tensor = _Product.apply(a_NP, b_PQ)
    return result


def unbind(stacked: Tensor) -> tuple[Tensor, ...]:
    """Return the views of `torch.unbind`. Autocast is off in its backward, which writes one stacked gradient."""
    views: tuple[Tensor, ...] = _Unbind.apply(stacked)
    return views


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, a_NP: Tensor, b_PQ: Tensor) -> Tensor:
        ctx.save_for_backward(a_NP, b_PQ)
        return a_NP @ b_PQ

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad_NQ: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a_NP, b_PQ = ctx.saved_tensors
        wants_a, wants_b = ctx.needs_input_grad
        multiply = product if torch.is_grad_enabled() else torch.matmul
        grad_a = multiply(grad_NQ, b_PQ.t()) if wants_a else None
        grad_b = multiply(a_NP.t(), grad_NQ) if wants_b else None
        return grad_a, grad_b


class _Unbind(Function):
    @staticmethod
    def forward(ctx: Any, stacked: Tensor) -> tuple[Tensor, ...]:
        return stacked.unbind(0)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.stack(grads)
