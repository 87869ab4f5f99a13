"""The layer of a case in its context. A case with the context `plain` has its layer as it is."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from experts import Unsupported
from moebench.measure.context import compiled
from moebench.measure.context.block import BlockLayer
from moebench.measure.context.sharding import fully_sharded, unsharded_grads
from moebench.measure.context.watch import Compute, Watch
from moebench.parity.oracle import wide
from moebench.parity.passes import stacked_grads
from moebench.workload.case import Case
from moebench.workload.context import PLAIN, Context
from moebench.workload.ranks import Ranks, is_dtensor

#: Why a layer that adds to main gradients cannot run a case.
NO_MAIN_GRADS = (
    "the backend adds to float32 main gradients, which only the context accumulate:N without fsdp2 has; take "
    "accumulate:N, or the engine's own backend"
)


class LayerInContext(nn.Module):
    """A layer whose calls happen in a context. Parameters, gradients and the dispatcher are those of the layer."""

    def __init__(self, layer: nn.Module, context: Context, device: torch.device, ranks: Ranks) -> None:
        super().__init__()
        self.layer = layer
        self._context, self._device, self._ranks = context, device, ranks
        self._adds_to_main_grads = adds_to_main_grads(layer)
        self.watch = Watch()
        self.graphs = compiled.Graphs() if context.compiled else None
        experts: nn.Module = layer.experts if isinstance(layer, BlockLayer) else layer
        if hasattr(experts, "compute_local") and not context.compiled:
            compute: Compute = experts.compute_local  # type: ignore[assignment]
            experts.compute_local = self.watch.rows_of(compute)  # type: ignore[assignment]
        if context.checkpoint == "checkpoint_experts":
            _recompute_experts(experts)
        if self.graphs is not None:
            self.graphs.compile(layer)
        if context.checkpoint in ("checkpoint", "checkpoint_reentrant"):
            _recompute_all(layer, self.watch, use_reentrant=context.checkpoint == "checkpoint_reentrant")

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return the layer's output."""
        if self._adds_to_main_grads and torch.is_grad_enabled():
            _make_main_grads(self.layer)
        if isinstance(self.layer, BlockLayer):  # FSDP would give zeros as the gradient of weights that nobody reads
            weights = weights.detach()
        with self._saved_tensors(), set_checkpoint_early_stop(not self.watch.is_on):
            output: Tensor = self.layer(x, token_mask, weights, indices)
            return output

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients. The next step makes main gradients anew, so those of this step keep their values."""
        super().zero_grad(set_to_none)
        if self._adds_to_main_grads:
            for parameter in self.layer.parameters():
                parameter.main_grad = None  # type: ignore[attr-defined]

    @property
    def dispatcher(self) -> Any:
        """The layer's dispatcher. None if it has none, if another one would be compiled, or if a call is several."""
        is_several = self._context.num_micro_batches > 1
        return None if self.graphs is not None or is_several else getattr(self.layer, "dispatcher", None)

    @dispatcher.setter
    def dispatcher(self, dispatcher: Any) -> None:
        self.layer.dispatcher = dispatcher

    def stacked_grads(self) -> dict[str, Tensor]:
        """Return the gradients of this rank's experts. All ranks must call this, to gather what FSDP has sharded."""
        if self._context.fsdp2:
            return unsharded_grads(self.layer, self._ranks)
        return stacked_grads(self.layer)

    @contextlib.contextmanager
    def _saved_tensors(self) -> Iterator[None]:
        if not self._context.offload:
            yield
            return
        with torch.autograd.graph.save_on_cpu(pin_memory=self._device.type == "cuda"):
            yield


def _recompute_all(layer: nn.Module, watch: Watch, use_reentrant: bool) -> None:
    """Let backward run the layer's forward again. What FSDP does around forward stays outside."""
    forward = watch.output_of(layer.forward)

    def forward_again(*tensors: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*tensors)
        output: Tensor = checkpoint(forward, *tensors, use_reentrant=use_reentrant)
        return output

    layer.forward = forward_again


def _recompute_experts(layer: nn.Module) -> None:
    """Let backward compute the layer's experts again, from the rows and choices that dispatch brought."""
    if not hasattr(layer, "compute_local"):
        raise Unsupported(
            "context checkpoint_experts needs a layer that computes its experts in a method compute_local, which "
            f"{type(layer).__name__} does not have; take checkpoint"
        )
    compute: Compute = layer.compute_local  # type: ignore[assignment]

    def compute_again(*tensors: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return compute(*tensors)
        output: Tensor = checkpoint(compute, *tensors, use_reentrant=False)
        return output

    layer.compute_local = compute_again  # type: ignore[assignment]


def adds_to_main_grads(layer: nn.Module) -> bool:
    """Return whether backward of the layer adds gradients to the attribute `main_grad` of parameters."""
    return bool(getattr(layer, "gradient_accumulation_fusion", False))


def _make_main_grads(layer: nn.Module) -> None:
    """Give each parameter that has none a main gradient of zeros: the first call of a step does it."""
    for parameter in layer.parameters():
        if getattr(parameter, "main_grad", None) is None:
            local = parameter.to_local() if is_dtensor(parameter) else parameter
            zeros = torch.zeros(local.shape, dtype=wide(local.dtype), device=local.device)
            parameter.main_grad = zeros  # type: ignore[attr-defined]


def in_context(layer: nn.Module, case: Case, device: torch.device, ranks: Ranks) -> nn.Module:
    """Return the layer of a case in the case's context. Raises Unsupported if the layer cannot have the context."""
    context, dtype = case.surroundings, getattr(torch, case.dtype)
    if adds_to_main_grads(layer) and (context.num_micro_batches == 1 or context.fsdp2):
        raise Unsupported(NO_MAIN_GRADS)
    if case.context == PLAIN:
        return layer
    main_dtype = wide(dtype) if context.num_micro_batches > 1 else dtype
    if context.fsdp2:
        layer = fully_sharded(layer, ranks, dtype, main_dtype)
    elif main_dtype is not dtype:
        if not hasattr(torch.Tensor, "grad_dtype"):
            raise Unsupported(f"float32 main gradients need Tensor.grad_dtype, which torch {torch.__version__} lacks")
        for parameter in layer.parameters():
            parameter.grad_dtype = main_dtype
    return LayerInContext(layer, context, device, ranks)
