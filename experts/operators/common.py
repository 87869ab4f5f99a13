"""Share the parts of the operators: checks, gradients, and autograd inside of an operator."""

import contextlib
import functools
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from experts.compute import Engine
from experts.config import MoEConfig
from experts.engines import get_engine
from experts.errors import Unsupported
from experts.layer import check_indices


@functools.cache
def config_of(text: str) -> MoEConfig:
    """Return the configuration that `experts.compiled.described` wrote as text."""
    return MoEConfig(**json.loads(text))


def checked(engine: str, config: MoEConfig, x_TD: Tensor, indices_TK: Tensor) -> Engine:
    """Return the engine, after the checks that a layer without the compiler makes before it dispatches."""
    check_indices(indices_TK, config.n_routed_experts)
    found = get_engine(engine)
    reason = found.unsupported(x_TD.device, config.with_dtype(x_TD.dtype))
    if reason is not None:
        raise Unsupported(f"{engine}: {reason.reason}")
    return found


def gradients(found: list[Tensor | None], like: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Return contiguous gradients. An operator cannot return None: an empty tensor stands for no gradient."""
    x_TD = like[0]
    assert x_TD is not None
    return [x_TD.new_empty(0) if grad is None else grad.contiguous() for grad in found]


def fake_gradients(tensors: tuple[Tensor | None, ...], wanted: list[bool]) -> list[Tensor]:
    """Return tensors with the shapes, dtypes and strides of what `gradients` returns."""
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
