"""Provide backends with one fault each that only a GPU shows: in streams, in the allocator's memory, in its kernels.

With this folder on PYTHONPATH, a test names a backend as a user would, for example `gpu_faults:OtherStream`.
"""

import functools

import torch
from torch import Tensor

from experts import BackendConfig, GroupedExperts, MoEConfig
from tests.backends.faulty_rows import with_grad

#: SM cycles of a wait that is longer than the host needs to go on.
LATE = 3_000_000


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """Return the stream on which these backends do their late work."""
    return torch.cuda.Stream()


class OtherStream(GroupedExperts):
    """The output is computed on another stream, and nobody waits for that stream."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        right = super().forward(x, token_mask, weights, indices)
        late = torch.zeros_like(right)
        side_stream().wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream()), torch.no_grad():
            torch.cuda._sleep(LATE)
            late.copy_(right.detach())
        return late + (right - right.detach())


class OtherStreamBackward(GroupedExperts):
    """The gradient of x is written on another stream, and nobody waits for that stream."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return super().forward(with_grad(x, self._late), token_mask, weights, indices)

    @staticmethod
    def _late(grad: Tensor) -> Tensor:
        late = torch.zeros_like(grad)
        side_stream().wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream()):
            torch.cuda._sleep(LATE)
            late.copy_(grad)
        return late


class UnwrittenRowOnGpu(GroupedExperts):
    """The last row of the output holds what was in the GPU's memory before."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        right = super().forward(x, token_mask, weights, indices)
        return torch.cat([right[:-1], torch.empty_like(right[-1:])]) if x.is_cuda else right


class TensorFloat32(GroupedExperts):
    """float32 is multiplied as TF32, which has ten bits."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            return super().forward(x, token_mask, weights, indices)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


class CopyNotAwaited(GroupedExperts):
    """The indices are copied to the host without a wait, and read there at once."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        host = torch.full(indices.shape, -1, dtype=torch.int64, pin_memory=True)
        torch.cuda._sleep(LATE)
        host.copy_(indices, non_blocking=True)
        read = host.clone()
        return super().forward(x, token_mask, weights, read.to(x.device))


class StaleGraph(GroupedExperts):
    """Without gradients, the call is a CUDA graph of its shape, and later replays read the first routing weights."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x, token_mask, weights, indices)
        first = self.__dict__.setdefault("first", {})
        key = (x.shape, x.dtype, weights.dtype)
        return super().forward(x, token_mask, first.setdefault(key, weights.clone()), indices)


class GridOverflow(GroupedExperts):
    """Tokens past 65,535, the largest second dimension of a grid, are not computed."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        launched_T = torch.arange(len(x), device=x.device) < 65_535
        return super().forward(x, token_mask & launched_T, weights, indices)


class TailLeaks(GroupedExperts):
    """Rows past the last group, which the kernel leaves unwritten, are added times zero."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        right = super().forward(x, token_mask, weights, indices)
        return right + 0 * torch.empty(64, right.shape[1], dtype=right.dtype, device=right.device).sum()


class StaticOutput(GroupedExperts):
    """The output is a static buffer, as of a captured graph, that the next call of the same shape overwrites."""

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        right = super().forward(x, token_mask, weights, indices)
        if right.requires_grad:
            return right
        buffers = self.__dict__.setdefault("buffers", {})
        buffer: Tensor = buffers.setdefault((right.shape, right.dtype), torch.empty_like(right))
        return buffer.copy_(right)


class UnwrittenGradOnGpu(GroupedExperts):
    """With grouped_mm, the down projection's gradient of experts without rows is never written."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config, BackendConfig(experts="loop"))
        self.down_projs.register_post_accumulate_grad_hook(self._forget)

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        chosen = indices.long()[token_mask].flatten()
        rows_E = (chosen + 1).bincount(minlength=self.n_routed_experts + 1)[1 : self.n_routed_experts + 1]
        self._empty_E = rows_E == 0
        return super().forward(x, token_mask, weights, indices)

    def _forget(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        unwritten = torch.empty_like(parameter.grad)
        parameter.grad.copy_(torch.where(self._empty_E[:, None, None], unwritten, parameter.grad))


#: A fault of the allocator shows where the memory is poisoned, which the covering cases do in half of all cases.
FAULTS = (
    OtherStream,
    OtherStreamBackward,
    UnwrittenRowOnGpu,
    TensorFloat32,
    CopyNotAwaited,
    StaleGraph,
    GridOverflow,
    TailLeaks,
    StaticOutput,
    UnwrittenGradOnGpu,
)
