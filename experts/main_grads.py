"""Add the gradients of weights to main gradients: float32 gradients that are there already, one a parameter.

Training adds up the gradients of micro-batches in float32. If backward adds each gradient itself, no other pass has to
read it. The interface is that of Megatron-LM's `gradient_accumulation_fusion` and of Transformer Engine's
`fuse_wgrad_accumulation`: the attribute `main_grad` of a parameter holds its main gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from experts.compute import ExpertParameters, MainGrads
from experts.errors import ConfigError
from experts.state_dict import as_local

#: The parameters that have main gradients. Biases get gradients as without them.
NAMES = MainGrads._fields


def main_grad(parameter: Tensor) -> Tensor | None:
    """Return this rank's part of the parameter's main gradient, or None if it has none."""
    found: Tensor | None = as_local(getattr(parameter, "main_grad", None))
    return found


def with_main_grads(module: nn.Module, local: ExpertParameters) -> tuple[ExpertParameters, MainGrads]:
    """Return this rank's parameters and the functions that return the main gradients of the weights.

    `local` are this rank's parameters. Raises ConfigError if a weight that requires a gradient has no main gradient, or
    if it has another dtype, shape or device than it must have. In backward, the functions raise the same.
    """
    functions: dict[str, Callable[[], Tensor] | None] = {}
    for name in NAMES:
        parameter = getattr(module, name)
        functions[name] = None
        if parameter.requires_grad:
            functions[name] = get = functools.partial(_checked, name, parameter, getattr(local, name).shape)
            get()
            local = local._replace(**{name: _AddsToMainGrad.apply(parameter)})
    return local, MainGrads(**functions)


def _checked(name: str, parameter: Tensor, shape: torch.Size) -> Tensor:
    found = main_grad(parameter)
    must = f"a contiguous torch.float32 tensor {list(shape)} on {parameter.device}, this rank's part of the parameter"
    if found is None:
        raise ConfigError(
            f"{name} has no main_grad, which gradient_accumulation_fusion needs; set {name}.main_grad to {must}. "
            "Parameters that FSDP2 shards cannot have one"
        )
    fits = found.shape == shape and found.dtype is torch.float32 and found.device == parameter.device
    if not fits or not found.is_contiguous():
        how = "" if found.is_contiguous() else ", not contiguous"
        raise ConfigError(
            f"{name}.main_grad is {found.dtype} {list(found.shape)} on {found.device}{how}; it must be {must}"
        )
    return found


class _AddsToMainGrad(Function):
    """Return this rank's part of a weight, whose gradient the engine adds to the weight's main gradient.

    The gradient that comes back is None. So the weight's `.grad` stays as it is, and no memory is needed for it.
    Optimizers and hooks that read `.grad` must read `main_grad`.

    Megatron-LM's data parallelism is the exception. It starts to reduce a main gradient in a hook, which runs when
    autograd has the parameter's `.grad`. The hook asserts that `.grad` is not None, because for None autograd runs it
    in another thread than the rest of backward. The hook drops `.grad` without reading it, if the parameter's attribute
    `grad_added_to_main_grad` is True. So where Megatron has given a parameter this attribute, it becomes True, and the
    weight gets a gradient of uninitialised memory, as Transformer Engine's weights do. With Megatron's attribute
    `zero_out_wgrad`, the hook does read the gradient, and then it is zeros.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.parameter = parameter
        local: Tensor = as_local(parameter)
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        assert grad is None
        parameter = ctx.parameter
        if not hasattr(parameter, "grad_added_to_main_grad"):
            return None
        parameter.grad_added_to_main_grad = True
        fill = torch.zeros_like if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like
        return fill(parameter, memory_format=torch.contiguous_format)
