"""Compute the local experts as one operator of torch, so that torch.compile makes one graph of the code around a layer.

torch's compiler does not look into the operators. If it traced the engines, it would break the graph: it cannot trace
this package's Triton kernels, the loop's rows depend on the routing, and torch's fake grouped_mm refuses float32 and
float16 (torch 2.13). A traced loop over 4 experts took over a minute to compile (CPU, 2026-11-29). With the operators,
a compiled layer runs the same kernels as a layer without the compiler, and gives the same bits.

`operators.again` is for every engine, and for adapters. In backward, it computes forward again. `operators.keep` is for
an engine with `Engine.own_products`, if autograd needs a gradient. It keeps for backward what the engine keeps without
the compiler.
Only compiled layers use the operators: a call of one takes tens of microseconds, which a forward of few tokens feels.

An operator takes only tensors and plain values. So an engine is given by its name, and a configuration as text.
"""

import dataclasses
import json

import torch
from torch import Tensor

from experts.compute import Adapters, ExpertParameters
from experts.config import MoEConfig, dtype_name
from experts.operators.again import compute
from experts.operators.keep import compute_and_keep


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
    save: str | None = None,
    keep: bool = False,
    adapters: Adapters | None = None,
) -> Tensor:
    """Return what the engine's `Compute` returns, by an operator that torch's compiler does not look into.

    `config` is what `described` returned. `keep` is whether the engine has `own_products` and there are no adapters.
    When the operator runs, it raises InputError for wrong indices on a CPU, and Unsupported if the engine cannot run.
    """
    tensors = x_TD, weights_TK, *parameters.to(x_TD.dtype)
    result: Tensor
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if wanted and keep:
        result = compute_and_keep(*tensors, indices_TK, engine, config, first, save)[0]
    else:
        matrices = (None,) * 4 if adapters is None else adapters.to(x_TD.dtype).tensors
        scale = 1.0 if adapters is None else adapters.scale
        result = compute(*tensors, *matrices, indices_TK, engine, config, first, save, scale)
    return result
