"""Run passes of a backend: forward and, in mode train, backward, in one piece or in micro-batches.

The gradients of micro-batches add up: x and the routing weights have a gradient for each token, and a parameter has the
sum over all tokens. So the gradients are those of a single batch, whatever the number of micro-batches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moebench.parity.oracle import ADAPTER_NAMES, PARAMETER_NAMES
from moebench.parity.reference import Tensors
from moebench.workload.inputs import Inputs


@dataclass(frozen=True)
class MicroBatch:
    """The tensors that one call reads. They share the memory of the inputs; x and the routing weights are leaves."""

    x_TD: Tensor
    token_mask_T: Tensor
    weights_TK: Tensor
    indices_TK: Tensor
    grad_TD: Tensor

    def forward(self, module: nn.Module) -> Tensor:
        """Return the module's output [T, D]."""
        output: Tensor = module(self.x_TD, self.token_mask_T, self.weights_TK, self.indices_TK)
        return output


def micro_batches(inputs: Inputs, count: int, train: bool) -> list[MicroBatch]:
    """Split the tokens into micro-batches whose numbers of tokens differ by at most one. A rank may have none."""
    split = zip(
        *(
            tensor.detach().tensor_split(count)
            for tensor in (inputs.x_TD, inputs.token_mask_T, inputs.weights_TK, inputs.indices_TK, inputs.grad_TD)
        ),
        strict=True,
    )
    return [
        MicroBatch(x.requires_grad_(train), mask, weights.requires_grad_(train), indices, grad)
        for x, mask, weights, indices, grad in split
    ]


def step(module: nn.Module, batches: list[MicroBatch]) -> Tensor:
    """Run forward and backward of each micro-batch, one after the other. Return the outputs [T, D] of all."""
    outputs = []
    for batch in batches:
        output = batch.forward(module)
        output.backward(batch.grad_TD)
        outputs.append(output.detach())
    return _joined_outputs(outputs)


def _joined_outputs(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def grads_of(module: nn.Module, batches: list[MicroBatch]) -> Tensors:
    """Return the gradients after a step, under the names of a pass. A gradient that is None has no entry."""
    x, weights = [one.x_TD.grad for one in batches], [one.weights_TK.grad for one in batches]
    found = {"x": _joined(x), "weights": _joined(weights), **stacked_grads(module)}
    return {f"{name}.grad": grad for name, grad in found.items() if grad is not None}


def _joined(grads: list[Tensor | None]) -> Tensor | None:
    present = [grad for grad in grads if grad is not None]
    if len(present) < len(grads):
        return None
    return present[0] if len(present) == 1 else torch.cat(present)


def run_pass(module: nn.Module, inputs: Inputs, mode: str, num_micro_batches: int = 1) -> Tensors:
    """Run one pass of a backend (forward and, in mode train, backward), and return its tensors by name.

    The tensor `output` is always there. In mode train, the dict also has the gradients `x.grad`, `weights.grad` and
    `<parameter>.grad`. If the backend leaves a gradient None, its name is absent. No call has more tokens than a
    micro-batch: what a layer reserves for its first call may be too small for all tokens.
    """
    if mode == "forward":
        with torch.no_grad():
            batches = micro_batches(inputs, num_micro_batches, False)
            return {"output": _joined_outputs([batch.forward(module) for batch in batches])}
    batches = micro_batches(inputs, num_micro_batches, True)
    module.zero_grad(set_to_none=True)
    output = step(module, batches)
    grads = grads_of(module, batches)
    module.zero_grad(set_to_none=True)
    return {"output": output, **grads}


def stacked_grads(module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the module's local experts, stacked by expert.

    They come from the module's method `stacked_grads` if it has one, else from its parameters of the usual names.
    """
    own: Callable[[], dict[str, Tensor]] | None = getattr(module, "stacked_grads", None)
    if own is not None:
        return own()
    parameters = {name: getattr(module, name, None) for name in (*PARAMETER_NAMES, *ADAPTER_NAMES)}
    return {name: p.grad for name, p in parameters.items() if p is not None and p.grad is not None}
