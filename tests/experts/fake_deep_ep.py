"""A fake of deep_ep.Buffer (1.2.1, within one node) over gloo, with its arguments, results and assertions."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

#: The room for scales in the hint for the size of a buffer.
MAX_SCALES = 128
RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)


class Config:
    """The memory that a transfer needs. The real class holds more."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self._tokens * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0 if num_ranks <= 8 else self._tokens * hidden_bytes * num_ranks


class Handle(NamedTuple):
    """What a dispatch computed, for the combine and for both backward passes."""

    is_token_in_rank: Tensor
    receive: list[int]
    num_sms: int


class Buffer:
    """Sends rows between the ranks of a group: in bfloat16, or to the experts also in FP8 with float32 scales.

    Each token goes once to every rank that needs it.
    """

    num_sms = 20
    made = 0
    destroyed = 0

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        explicitly_destroy: bool = False,
    ) -> None:
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.explicitly_destroy = explicitly_destroy
        self.runtime: object | None = object()
        Buffer.made += 1

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        assert self.runtime is not None
        self.runtime = None
        Buffer.destroyed += 1

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in RANKS, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(256)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        assert num_ranks in RANKS, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(128)

    @staticmethod
    def is_sm90_compiled() -> bool:
        return True

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, **events: Any
    ) -> tuple[Tensor, None, Tensor, Tensor, None]:
        """Return tokens per rank, None (RDMA), tokens per expert, is_token_in_rank [T, ranks], and None (event)."""
        _check_events(**events)
        assert self.runtime is not None
        assert topk_idx.dtype is torch.int64
        assert topk_idx.ndim == 2
        assert topk_idx.is_contiguous()
        assert num_experts % self.group.size() == 0
        tokens_per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        assert tokens_per_expert.numel() == num_experts
        ranks = torch.where(topk_idx >= 0, topk_idx // (num_experts // self.group.size()), -1)
        is_token_in_rank = (ranks.unsqueeze(-1) == torch.arange(self.group.size())).any(dim=1)
        return is_token_in_rank.sum(dim=0).int(), None, tokens_per_expert.int(), is_token_in_rank, None

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        **events: Any,
    ) -> tuple[Any, Tensor | None, Tensor | None, list[int] | None, Handle | None, None]:
        """Return received rows, local expert indices (−1: not local), weights, tokens per local expert, handle, None.

        Rows in FP8 come with their scales, as they were given. With a handle, only the rows are sent, by the same way
        as in the dispatch that returned the handle.
        """
        rows, (x, scales) = x, x if isinstance(x, tuple) else (x, None)
        self._check(x, torch.bfloat16 if scales is None else torch.float8_e4m3fn)
        if scales is not None:
            assert scales.dtype is torch.float32
            assert scales.ndim == 2
            assert scales.shape[0] == x.shape[0]
            assert scales.shape[1] <= MAX_SCALES
            assert x.shape[1] % 32 == 0, "the kernel copies two halves of whole 16 bytes"
        _check_events(**events)
        if handle is not None:
            assert topk_idx is topk_weights is None
            assert x.shape[0] == handle.is_token_in_rank.shape[0]
            assert handle.num_sms == Buffer.num_sms, "the handle has as many channels as there were SMs"
            return self._send_rows(rows, handle), None, None, None, None, None
        for given in (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights):
            assert given is not None
            assert given.is_contiguous()
        assert topk_weights.dtype is torch.float32
        assert topk_idx.dtype is torch.int64
        assert x.shape[0] == topk_idx.shape[0] == is_token_in_rank.shape[0]
        sent = num_tokens_per_rank.long()
        receive = torch.empty_like(sent)
        dist.all_to_all_single(receive, sent, group=self.group)
        handle = Handle(is_token_in_rank, receive.tolist(), Buffer.num_sms)
        local = self._send(topk_idx, handle) - self.group.rank() * (num_tokens_per_expert.numel() // self.group.size())
        is_local = (local >= 0) & (local < num_tokens_per_expert.numel() // self.group.size())
        local = torch.where(is_local, local, -1)
        weights = torch.where(is_local, self._send(topk_weights, handle), 0.0)
        per_expert = torch.bincount(local[is_local], minlength=num_tokens_per_expert.numel() // self.group.size())
        return self._send_rows(rows, handle), local, weights, per_expert.tolist(), handle, None

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, **events: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        """Return each token's rows and weights, summed in float32 over the ranks that it went to, and None (event)."""
        self._check(x, torch.bfloat16)
        _check_events(**events)
        assert x.shape[0] == sum(handle.receive)
        assert handle.num_sms == Buffer.num_sms, "the handle has as many channels as there were SMs"
        if topk_weights is None:
            return self._sum(x, handle), None, None
        assert topk_weights.dtype is torch.float32
        assert topk_weights.is_contiguous()
        return self._sum(x, handle), self._sum(topk_weights, handle), None

    def _check(self, x: Tensor, dtype: torch.dtype) -> None:
        assert self.runtime is not None, "the buffer was destroyed"
        assert x.dtype is dtype
        assert x.is_contiguous()
        assert x.data_ptr() % 16 == 0, "the kernels read 16 bytes at a time: a misaligned address is an error of CUDA"
        row_bytes = x.shape[1] * x.element_size()
        assert row_bytes % 16 == 0
        for config in (self.get_dispatch_config(self.group.size()), self.get_combine_config(self.group.size())):
            assert self.num_nvl_bytes >= config.get_nvl_buffer_size_hint(row_bytes, self.group.size())

    def _send_rows(self, x: Tensor | tuple[Tensor, Tensor], handle: Handle) -> Any:
        if not isinstance(x, tuple):
            return self._send(x, handle)
        values = self._send(x[0].view(torch.uint8), handle)  # gloo has no FP8
        return values.view(x[0].dtype), self._send(x[1], handle)

    def _send(self, rows: Tensor, handle: Handle) -> Tensor:
        ranks, tokens = handle.is_token_in_rank.t().nonzero(as_tuple=True)
        send = torch.bincount(ranks, minlength=self.group.size()).tolist()
        received = rows.new_empty(sum(handle.receive), rows.shape[1])
        dist.all_to_all_single(received, rows[tokens], handle.receive, send, group=self.group)
        return received

    def _sum(self, rows: Tensor, handle: Handle) -> Tensor:
        ranks, tokens = handle.is_token_in_rank.t().nonzero(as_tuple=True)
        send = torch.bincount(ranks, minlength=self.group.size()).tolist()
        back = rows.new_empty(sum(send), rows.shape[1])
        dist.all_to_all_single(back, rows, send, handle.receive, group=self.group)
        total = torch.zeros(handle.is_token_in_rank.shape[0], rows.shape[1])
        for rank in range(self.group.size()):
            total[tokens[ranks == rank]] += back[ranks == rank].float()
        return total.to(rows.dtype)


def _check_events(
    previous_event: Any = None, async_finish: bool = False, allocate_on_comm_stream: bool = False
) -> None:
    assert (previous_event, async_finish, allocate_on_comm_stream) == (None, False, False), "not in this fake"


def modules() -> dict[str, ModuleType]:
    """Return the fake modules by the name that `import` uses."""
    module: Any = ModuleType("deep_ep")
    module.Buffer, module.Config = Buffer, Config
    module.utils = utils = ModuleType("deep_ep.utils")
    utils.EventHandle = utils.EventOverlap = None  # for asynchronous calls, which are not in this fake
    return {"deep_ep": module, "deep_ep.utils": utils}
