"""Send each token once to every rank that holds one of the token's experts, with DeepEP, over NVLink and RDMA.

This is the dispatcher `deepep`. It calls `deep_ep.Buffer`. The backward of dispatch is DeepEP's combine, and the
backward of combine is DeepEP's dispatch. The two backward passes use the handle that the forward dispatch returned. All
layers of a process group share one buffer, which is large enough for the largest layer.
"""

import atexit
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from experts import catalog
from experts.config import MoEConfig, dtype_name
from experts.dispatch import Dispatched, OverGroup
from experts.errors import ConfigError, Unsupported
from experts.fp8.blocks import num_blocks
from experts.fp8.tokens import Fp8Tokens
from experts.hosts import hosts_of

ROW_ALIGNMENT_BYTES = 16
FP8_MULTIPLE = 32  # the kernel copies a row in two halves
MAX_RANKS_A_NODE = 8
#: The limit of deep_ep's notify kernel, which has one thread per expert.
MAX_EXPERTS_A_RANK = 128
DEFAULT_NUM_SMS = 20

_buffers: dict[dist.ProcessGroup, Any] = {}


def unsupported(device: torch.device, config: MoEConfig | None) -> Unsupported | None:
    """Return why DeepEP cannot carry the config's tokens on the device, or None where it can.

    DeepEP takes bfloat16 rows on CUDA GPUs. The size of a row must be a multiple of 16 bytes. DeepEP's kernels also
    need SM90 or later, which this function does not check.
    """
    try:
        _deep_ep()
    except Unsupported as missing:
        return missing
    if device.type != "cuda":
        return Unsupported(f"deep_ep moves tokens between CUDA GPUs, the device is {device.type}; use alltoall")
    if config is None:
        return None
    if config.dtype is not torch.bfloat16:
        return Unsupported(f"deep_ep dispatches bfloat16, not {dtype_name(config.dtype)}; use alltoall")
    if config.dim * config.dtype.itemsize % ROW_ALIGNMENT_BYTES:
        return Unsupported(
            f"deep_ep takes rows that are a multiple of {ROW_ALIGNMENT_BYTES} bytes, but dim = {config.dim} is "
            f"{config.dim * config.dtype.itemsize}; use alltoall"
        )
    return None


def _deep_ep() -> Any:
    try:
        import deep_ep
    except (ImportError, OSError) as error:
        raise Unsupported(catalog.missing("deep_ep", error)) from error
    return deep_ep


def shared_buffer(group: dist.ProcessGroup, row_bytes: int) -> Any:
    """Return the group's buffer. Makes the buffer, or a larger buffer, if rows of `row_bytes` need it.

    Raises Unsupported for fewer than two ranks, and for a number of ranks that `deep_ep` does not run on, or that stand
    on nodes that it does not run on.
    """
    deep_ep = _deep_ep()
    if group.size() < 2:
        raise Unsupported("deep_ep needs at least 2 ranks, the group has 1; leave the dispatcher out")
    try:
        configs = (deep_ep.Buffer.get_dispatch_config(group.size()), deep_ep.Buffer.get_combine_config(group.size()))
    except AssertionError as error:
        raise Unsupported(f"deep_ep does not run on {group.size()} ranks; use alltoall") from error
    nvl_bytes = max(config.get_nvl_buffer_size_hint(row_bytes, group.size()) for config in configs)
    rdma_bytes = max(config.get_rdma_buffer_size_hint(row_bytes, group.size()) for config in configs)
    if group.size() <= MAX_RANKS_A_NODE:
        rdma_bytes = 0
    buffer = _buffers.get(group)
    if buffer is None or buffer.num_nvl_bytes < nvl_bytes or buffer.num_rdma_bytes < rdma_bytes:
        if reason := _wrong_nodes(hosts_of(group)):
            raise Unsupported(reason)
        _destroy(group)
        _buffers[group] = deep_ep.Buffer(group, nvl_bytes, rdma_bytes, explicitly_destroy=True)
    return _buffers[group]


def _wrong_nodes(hosts: Sequence[object]) -> str | None:
    """Return why deep_ep does not run on ranks with these hosts, in the order of the ranks; None if it does.

    Up to eight ranks reach each other over NVLink. More ranks need RDMA between nodes, and then deep_ep takes each
    eight ranks that follow each other for one node.
    """
    if len(hosts) <= MAX_RANKS_A_NODE:
        alike = len(set(hosts)) == 1
        return None if alike else f"deep_ep needs up to {MAX_RANKS_A_NODE} ranks on one node; use alltoall"
    nodes = [set(hosts[first : first + MAX_RANKS_A_NODE]) for first in range(0, len(hosts), MAX_RANKS_A_NODE)]
    if all(len(node) == 1 for node in nodes) and len(set().union(*nodes)) == len(nodes):
        return None
    return f"deep_ep needs {MAX_RANKS_A_NODE} ranks on each node, in the order of the ranks; use alltoall"


def destroy_buffers() -> None:
    """Free every group's buffer. All ranks must call this function before they destroy their process group."""
    for group in list(_buffers):
        _destroy(group)


def _destroy(group: dist.ProcessGroup) -> None:
    buffer = _buffers.pop(group, None)
    if buffer is not None:
        torch.cuda.synchronize()
        buffer.destroy()


atexit.register(destroy_buffers)


class DeepEP(OverGroup):
    """The dispatcher over one NCCL process group of at least two ranks.

    `num_sms`, an even number, is the number of multiprocessors (SMs) that move rows. Raises ConfigError for more than
    the GPU has. Raises Unsupported for more than 128 experts per rank, for rows in FP8 that are no multiple of 32
    values, and for a number of ranks for which `shared_buffer` raises it.

    With `fp8_rows`, tokens and the gradients of combine's result travel in FP8 with scales, as `Fp8Tokens`. What the
    experts send back stays in bfloat16.
    """

    def __init__(
        self, group: dist.ProcessGroup, config: MoEConfig, num_sms: int = DEFAULT_NUM_SMS, fp8_rows: bool = False
    ) -> None:
        n_local_experts = config.n_routed_experts // group.size()
        if n_local_experts > MAX_EXPERTS_A_RANK:
            raise Unsupported(
                f"deep_ep dispatches to at most {MAX_EXPERTS_A_RANK} experts per rank, but n_routed_experts = "
                f"{config.n_routed_experts} on {group.size()} ranks is {n_local_experts}; use more ranks, or alltoall"
            )
        if fp8_rows and config.dim % FP8_MULTIPLE:
            raise Unsupported(f"deep_ep takes FP8 rows of a multiple of {FP8_MULTIPLE}, not {config.dim}; use symm_mem")
        _check_sms(num_sms)
        super().__init__(group)
        self._n_routed_experts = config.n_routed_experts
        self._first = group.rank() * n_local_experts
        self._row_bytes = config.dim * torch.bfloat16.itemsize
        self._buffer_class = _deep_ep().Buffer
        self.num_sms = num_sms
        self._fp8_rows = fp8_rows
        self._buffer_class.set_num_sms(num_sms)  # before the buffer is made: its size depends on `num_sms`
        shared_buffer(group, self._row_bytes)

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Dispatched:
        """Return the tokens that chose an expert of this rank, and float32 weights. The host waits for their number.

        Raises Unsupported for x that is not bfloat16.
        """
        if x_TD.dtype is not torch.bfloat16:
            raise Unsupported(f"deep_ep dispatches bfloat16, x is {x_TD.dtype}; use alltoall")
        route = _Route(self.buffer, self._n_routed_experts, self._fp8_rows)
        weights_TK, indices_TK = weights_TK.float().contiguous(), indices_TK.contiguous()
        x_RD, weights_RK, local_RK = _Dispatch.apply(x_TD, weights_TK, indices_TK, route)
        # −1 becomes the previous rank's last expert, which contributes nothing here
        row_bytes = x_RD.shape[1] + num_blocks(x_RD.shape[1]) * torch.float32.itemsize if route.fp8 else None
        return Dispatched(x_RD, weights_RK, local_RK + self._first, route, row_bytes)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return this rank's tokens [T, D], which DeepEP sums over the ranks."""
        combined: Tensor = _Combine.apply(_packed(y_RD), dispatched.origin)
        return combined

    def buffer(self) -> Any:
        """Return the group's current buffer, after setting the number of SMs.

        Each layer has a number of SMs, but in `deep_ep` the number is global.
        """
        self._buffer_class.set_num_sms(self.num_sms)
        return _buffers.get(self._group) or shared_buffer(self._group, self._row_bytes)

    def raw_ways(
        self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, y_RD: Tensor, dispatched: Dispatched
    ) -> tuple[Callable[[], object], Callable[[], object]]:
        """Return two functions that call DeepEP directly. The first moves the rows out, the second moves the rows back.

        The functions move the same rows as `dispatch` and `combine`, but leave out the work that `dispatch` and
        `combine` do besides the calls of DeepEP.
        """
        route: _Route = dispatched.origin
        buffer = route.buffer()
        sent = _as_sent(x_TD, route.fp8)
        return (
            lambda: _send(buffer, sent, weights_TK, indices_TK, route.n_routed_experts),
            lambda: buffer.combine(y_RD, route.handle),
        )


def make(group: dist.ProcessGroup, config: MoEConfig, num_sms: int = DEFAULT_NUM_SMS, fp8_rows: bool = False) -> DeepEP:
    """Return the dispatcher over a group, for the config's experts."""
    return DeepEP(group, config, num_sms, fp8_rows)


def _check_sms(num_sms: int) -> None:
    """Raise ConfigError for more SMs than the GPU has: DeepEP's blocks wait for each other, so all must run at once."""
    most = torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else num_sms
    if num_sms > most:
        raise ConfigError(f"num_sms = {num_sms}: the GPU has {most} multiprocessors; give an even number up to {most}")


#: What DeepEP sends: a tensor in bfloat16, or values [T, D] in FP8 and scales [T, blocks of D] in float32.
_Rows = Tensor | tuple[Tensor, Tensor]


def _as_sent(x_TD: Tensor, fp8: bool) -> _Rows:
    """Return tokens as they travel."""
    if not fp8:
        return _packed(x_TD)
    from experts.fp8.quantise import quantise_tokens

    tokens = quantise_tokens(x_TD)
    return tokens.values, tokens.scales.t().contiguous()


def _send(buffer: Any, x_TD: _Rows, weights_TK: Tensor, indices_TK: Tensor, n_routed_experts: int) -> Any:
    tokens_per_rank, tokens_per_rdma_rank, tokens_per_expert, is_in_rank, _ = buffer.get_dispatch_layout(
        indices_TK, n_routed_experts
    )
    return buffer.dispatch(
        x_TD,
        topk_idx=indices_TK,
        topk_weights=weights_TK,
        num_tokens_per_rank=tokens_per_rank,
        num_tokens_per_rdma_rank=tokens_per_rdma_rank,
        is_token_in_rank=is_in_rank,
        num_tokens_per_expert=tokens_per_expert,
    )


def _packed(rows: Tensor) -> Tensor:
    """Return the rows without gaps, from a multiple of 16 bytes on: DeepEP moves 16 bytes at a time."""
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % ROW_ALIGNMENT_BYTES else rows


class _Route:
    """The handle of one dispatch, and the function that returns the group's buffer.

    The combine after the dispatch, and the backward passes of dispatch and combine, use the handle. They ask for the
    buffer again, because between forward and backward a larger layer may replace the buffer, and another layer may set
    another number of SMs. `handle` is None until the dispatch has run. `fp8` is whether rows travel in FP8.
    """

    def __init__(self, buffer: Callable[[], Any], n_routed_experts: int, fp8: bool) -> None:
        self.buffer = buffer
        self.n_routed_experts = n_routed_experts
        self.fp8 = fp8
        self.handle: Any = None


class _Dispatch(Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, route: _Route
    ) -> tuple[Tensor, Tensor, Tensor]:
        sent = _as_sent(x_TD, route.fp8)
        rows, local_RK, weights_RK, _, route.handle, _ = _send(
            route.buffer(), sent, weights_TK, indices_TK, route.n_routed_experts
        )
        ctx.route = route
        ctx.mark_non_differentiable(local_RK)
        x_RD = Fp8Tokens(rows[0], rows[1], x_TD.dtype) if route.fp8 else rows
        return x_RD, weights_RK, local_RK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x_RD: Tensor, grad_weights_RK: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        route: _Route = ctx.route
        grad_x_TD, grad_weights_TK, _event = route.buffer().combine(
            _packed(grad_x_RD), route.handle, topk_weights=grad_weights_RK.contiguous()
        )
        return grad_x_TD, grad_weights_TK, None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        y_TD: Tensor = route.buffer().combine(y_RD, route.handle)[0]
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        route: _Route = ctx.route
        rows = route.buffer().dispatch(_as_sent(grad_TD, route.fp8), handle=route.handle)[0]
        return Fp8Tokens(rows[0], rows[1], grad_TD.dtype) if route.fp8 else rows, None
