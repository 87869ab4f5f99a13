"""Pack tokens into one message per rank, and sum the rows that come back.

A message has the rows of its tokens, in the order of the tokens, and then the routing weights and the int32 indices of
these rows. Weights and indices are bytes in the place of a few more rows, so that one message carries all, and the
messages from all ranks, one after another, are one tensor of rows. The engine takes them as they arrive: the rows that
hold weights and indices get indices of −1.

A buffer to send has the messages to the other ranks, in their order. The message of a rank to itself does not travel:
it is written where the rank receives the messages, and is read there when the results come back.

All numbers of tokens are on the device. So the messages can be packed before the host knows how long they are.

The functions have two implementations. `eager` is plain torch: it defines what each function does. `fused` is Triton:
each function is one kernel, and none waits for the device. As for `experts.steps`, the fused functions run on CUDA with
Triton, and EXPERTS_STEPS chooses otherwise.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from experts.steps import make_of_steps

#: Weights and indices start at multiples of this number of bytes, which any dtype accepts.
ALIGNMENT_BYTES = 16
INDEX_BYTES = torch.int32.itemsize

_N = TypeVar("_N", int, Tensor)


def rounded_up(number: _N, multiple: int) -> _N:
    """Return the next multiple of `multiple`."""
    return -(-number // multiple) * multiple


def choices_bytes(count: _N, n_activated_experts: int, weights_dtype: torch.dtype) -> tuple[_N, _N]:
    """Return where the indices of `count` rows start, after the rows' routing weights, and where they end."""
    start = rounded_up(count * (n_activated_experts * weights_dtype.itemsize), ALIGNMENT_BYTES)
    return start, start + count * (n_activated_experts * INDEX_BYTES)


@dataclass(frozen=True)
class Form:
    """The sizes and dtypes that all messages of one dispatch have in common."""

    dim: int
    n_activated_experts: int
    dtype: torch.dtype
    weights_dtype: torch.dtype

    @cached_property
    def row_bytes(self) -> int:
        """The size of a row."""
        return self.dim * self.dtype.itemsize

    @cached_property
    def unit(self) -> int:
        """The number of rows after which bytes are aligned again. Messages, and the choices in them, start there."""
        return ALIGNMENT_BYTES // math.gcd(ALIGNMENT_BYTES, self.row_bytes)

    def choices_row(self, count: _N) -> _N:
        """Return the row of a message of `count` tokens at which weights and indices start."""
        return rounded_up(count, self.unit)

    def length(self, count: _N) -> _N:
        """Return how many rows a message of `count` tokens is long; 0 without tokens."""
        end = choices_bytes(count, self.n_activated_experts, self.weights_dtype)[1]
        return self.choices_row(count) + rounded_up(-(-end // self.row_bytes), self.unit)

    def most_rows(self, num_tokens: int, num_ranks: int) -> int:
        """Return a number of rows that is enough for the messages to some ranks, for any routing of the tokens."""
        count = num_tokens * min(num_ranks, self.n_activated_experts)
        alignment = 2 * self.unit + -(-ALIGNMENT_BYTES // self.row_bytes)  # of each message, at most
        return self.length(count) + num_ranks * alignment if num_tokens else 0


@dataclass(frozen=True)
class Plan:
    """Which token of this rank is in which message.

    Token t is row `row_TP[t, p]` of the message to rank p; −1: the token does not go there. `counts_P` has the number
    of tokens of each message. Both are int32, on the device. `own` is this rank.
    """

    form: Form
    row_TP: Tensor
    counts_P: Tensor
    own: int


class Messages(Protocol):
    """The functions around the messages. T tokens, K choices, P ranks, S rows of a buffer to send or that came back."""

    def plan(self, indices_TK: Tensor, num_ranks: int, n_local_experts: int) -> tuple[Tensor, Tensor]:
        """Return `row_TP` and `sizes_2P`, both int32. `sizes_2P[0]` is `counts_P`, and `sizes_2P[1]` is unwritten.

        A token goes once to each rank that holds one of its experts.
        """

    def pack(
        self, plan: Plan, x_TD: Tensor, weights_TK: Tensor | None = None, indices_TK: Tensor | None = None
    ) -> Tensor:
        """Return the messages to the other ranks, with weights and indices if they are given: [`form.most_rows`, D]."""

    def pack_own(
        self,
        plan: Plan,
        message_SD: Tensor,
        x_TD: Tensor,
        weights_TK: Tensor | None = None,
        indices_TK: Tensor | None = None,
    ) -> None:
        """Write the message of this rank to itself, with weights and indices if they are given."""

    def take_choices(self, received_RD: Tensor, counts_P: Tensor, longest: int, form: Form) -> tuple[Tensor, Tensor]:
        """Return routing weights [R, K] and int64 indices [R, K] of the messages that this rank has received.

        `longest` is the length of the longest message. A row that is no token has indices of −1 and weights of zero.
        """

    def sum_rows(
        self, plan: Plan, rows: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the sum [T, D] of each token's rows in all messages and, if given, the sum [T, K] of its weights.

        `rows` are the messages from the other ranks [S, D] and the message of this rank to itself. The weights come in
        the same way, as rows of K columns. Sums are in float32 (float64 for float64), in the order of the ranks. A
        token without rows has zeros.
        """

    def pack_choices(self, weights_TK: Tensor, indices_TK: Tensor, num_rows: int) -> Tensor:
        """Return weights and indices of T tokens as bytes. Rows up to `num_rows` get weights of zero, indices of −1."""

    def unpack_choices(
        self, packed: Tensor, num_rows: int, n_activated_experts: int, weights_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return weights [R, K] and int64 indices [R, K] of one or more results of `pack_choices`, one after another.

        Each of them has `num_rows` rows.
        """


def messages_on(device: torch.device) -> Messages:
    """Return the functions for tensors on a device."""
    if make_of_steps(device) == "fused":
        from experts.messages import fused

        return fused
    from experts.messages import eager

    return eager
