"""The memory-bound steps around the products of grouped engines, each of one meaning and two makes.

`eager` is plain torch: it says what a step means and runs any dtype on any device. `fused` is Triton: each step reads
and writes its bytes once. On CUDA with Triton the steps are fused, but for float64; elsewhere they are eager.
`EXPERTS_STEPS=eager` in the environment keeps them eager, `EXPERTS_STEPS=fused` asks for Triton on a CPU too, where its
interpreter (TRITON_INTERPRET=1) runs them.

No step waits for the device, and each gives the same bits from run to run. The permuted side has N rows; those past
the last group hold anything, NaN included, and are not read.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from experts.config import MoEConfig
from experts.errors import ConfigError

VARIABLE = "EXPERTS_STEPS"
Make = Literal["eager", "fused"]


@dataclass(frozen=True)
class Permutation:
    """Where every row comes from and goes to. N = T·K; L local experts; a slot is one choice of one token, t·K + k."""

    row_to_slot_N: Tensor  # int64
    slot_to_row_S: Tensor  # int64 [T·K], the inverse
    row_to_expert_N: Tensor  # int64, local expert, or L for the rows of none
    offsets_L: Tensor  # int32, cumulative: where each expert's group ends
    n_activated_experts: int

    @property
    def num_rows(self) -> int:
        """N."""
        return self.row_to_slot_N.shape[0]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.slot_to_row_S.shape[0] // self.n_activated_experts

    @property
    def row_to_token_N(self) -> Tensor:
        """[N] int64."""
        return self.row_to_slot_N // self.n_activated_experts

    @property
    def is_local_TK(self) -> Tensor:
        """[T, K] bool: whether the choice has a row in one of the groups."""
        return (self.slot_to_row_S < self.offsets_L[-1]).view(self.num_tokens, self.n_activated_experts)

    @property
    def tokens_per_expert_L(self) -> Tensor:
        """[L] int64."""
        return torch.diff(self.offsets_L, prepend=self.offsets_L.new_zeros(1)).long()

    def cut(self, num_rows: int) -> "Permutation":
        """Without the rows past the last group: `num_rows` is `offsets_L[-1]`, for callers that know it on the host."""
        return Permutation(
            self.row_to_slot_N[:num_rows],
            self.slot_to_row_S,  # who had a row past the end is not local, and nobody looks for the row
            self.row_to_expert_N[:num_rows],
            self.offsets_L,
            self.n_activated_experts,
        )


class Steps(Protocol):
    """The steps. Floats are of one dtype but for the routing weights, which have their own; sums are in float32
    (float64 for float64). Routing weights of choices that are not local are not read.
    """

    def sort_by_expert(self, indices_TK: Tensor, first: int, count: int) -> Permutation:
        """Group the choices of experts `first` … `first + count − 1`, in the tokens' order; the others come last."""

    def gather_rows(self, x_TD: Tensor, permutation: Permutation, weights_TK: Tensor | None = None) -> Tensor:
        """Each row's token [N, D], times its routing weight where given."""

    def sum_rows(
        self,
        y_ND: Tensor,
        permutation: Permutation,
        weights_TK: Tensor | None = None,
        bias_LD: Tensor | None = None,
        weigh_rows: bool = False,
    ) -> Tensor:
        """Sum [T, D] over a token's local choices of y + weight·bias, or weight·(y + bias) where `weigh_rows`.

        A bias, or `weigh_rows`, needs the weights.
        """

    def activate(
        self,
        h_NH: Tensor,
        permutation: Permutation,
        weights_TK: Tensor | None,
        bias_LH: Tensor | None,
        config: MoEConfig,
    ) -> Tensor:
        """The weighted activation [N, I] of h + bias; without weights, unweighted. H = 2I, ungated I."""

    def activate_backward(
        self,
        h_NH: Tensor,
        grad_NI: Tensor,
        permutation: Permutation,
        weights_TK: Tensor | None,
        bias_LH: Tensor | None,
        config: MoEConfig,
        again: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradient of h [N, H], `activate`'s result where wanted `again` [N, I], and the gradient of the weights [T, K]
        in float32 (float64).

        With `again`, h and `grad_NI` are the callee's, which may write the first two results over them.
        """

    def sum_by_expert(self, rows_NC: Tensor, permutation: Permutation, weights_TK: Tensor | None = None) -> Tensor:
        """Sum [L, C] of each expert's rows, times their routing weights where given; zeros for an expert without."""

    def dot_rows(self, x_TD: Tensor, permutation: Permutation, y_ND: Tensor | None, bias_LD: Tensor | None) -> Tensor:
        """Product [T, K] of each token's x and y + bias of its row, in float32 (float64); zero for who has no row."""


def make_of_steps(device: torch.device, dtype: torch.dtype | None = None) -> Make:
    """Which make runs on tensors there. Raises ConfigError for an environment that names none."""
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "eager", "fused"):
        raise ConfigError(f"{VARIABLE} = {asked!r} in the environment; give 'eager' or 'fused', or leave it out")
    if asked == "eager" or dtype is torch.float64 or device.type not in ("cpu", "cuda"):
        return "eager"
    return "fused" if asked == "fused" or (device.type == "cuda" and _has_triton()) else "eager"


def steps_on(device: torch.device, dtype: torch.dtype | None = None) -> Steps:
    """The steps for tensors of a dtype on a device."""
    if make_of_steps(device, dtype) == "fused":
        from experts.steps import fused

        return fused
    from experts.steps import eager

    return eager


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
