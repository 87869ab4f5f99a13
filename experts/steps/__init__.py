"""Run the memory-bound steps around the matrix products of engines that group rows by expert.

The steps are the sort, the gathers, the sums and the activation. Each step has two implementations. `eager` is plain
torch: it defines what a step computes, and it runs every dtype on every device. `fused` is Triton: each step reads and
writes its bytes once. On CUDA with Triton, the fused steps run, except for float64. In all other cases the eager steps
run. In the environment, `EXPERTS_STEPS=eager` makes all steps eager. `EXPERTS_STEPS=fused` makes the steps fused on a
CPU, which needs Triton's interpreter (TRITON_INTERPRET=1).

No step waits for the device, and every step returns the same bits in every run. The permuted tensors have N rows. Rows
past the last group may hold anything, even NaN, and no step reads these rows.
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
    """The mapping between rows and choices. N = T·K rows, and choice k of token t has the slot number t·K + k."""

    row_to_slot_N: Tensor  # int64
    slot_to_row_S: Tensor  # int64 [T·K], the inverse of row_to_slot_N
    row_to_expert_N: Tensor  # int64, the local expert, or L for a row without a local expert
    offsets_L: Tensor  # int32, cumulative: the end of each expert's group
    n_activated_experts: int

    @property
    def num_rows(self) -> int:
        """The number of rows, N."""
        return self.row_to_slot_N.shape[0]

    @property
    def num_tokens(self) -> int:
        """The number of tokens, T."""
        return self.slot_to_row_S.shape[0] // self.n_activated_experts

    @property
    def row_to_token_N(self) -> Tensor:
        """The token of each row, [N] int64."""
        return self.row_to_slot_N // self.n_activated_experts

    @property
    def is_local_TK(self) -> Tensor:
        """Whether each choice has a row in one of the groups, [T, K] bool."""
        return (self.slot_to_row_S < self.offsets_L[-1]).view(self.num_tokens, self.n_activated_experts)

    @property
    def tokens_per_expert_L(self) -> Tensor:
        """The number of rows of each local expert, [L] int64."""
        return torch.diff(self.offsets_L, prepend=self.offsets_L.new_zeros(1)).long()

    def cut(self, num_rows: int) -> "Permutation":
        """Return the permutation without the rows past the last group.

        `num_rows` must be `offsets_L[-1]`. The method is for callers that know this number on the host.
        """
        return Permutation(
            self.row_to_slot_N[:num_rows],
            self.slot_to_row_S,  # a slot with a row past the end is not local, so no step reads that row
            self.row_to_expert_N[:num_rows],
            self.offsets_L,
            self.n_activated_experts,
        )


class Steps(Protocol):
    """The interface of the steps.

    All float tensors have the same dtype, except the routing weights, which may have another dtype. Sums are in float32
    (float64 for float64). No step reads the routing weights of choices that are not local.
    """

    def mask_choices(self, indices_TK: Tensor, token_mask_T: Tensor) -> Tensor:
        """Return int64 indices [T, K], −1 for the choices of tokens that the mask [T] bool leaves out.

        In an unsigned dtype, −1 would be an expert.
        """

    def sort_by_expert(self, indices_TK: Tensor, first: int, count: int) -> Permutation:
        """Group the choices of experts `first` … `first + count − 1`, in the tokens' order. Other choices come last."""

    def gather_rows(self, x_TD: Tensor, permutation: Permutation, weights_TK: Tensor | None = None) -> Tensor:
        """Return each row's token [N, D], times the row's routing weight if weights are given."""

    def sum_rows(
        self,
        y_ND: Tensor,
        permutation: Permutation,
        weights_TK: Tensor | None = None,
        bias_LD: Tensor | None = None,
        weigh_rows: bool = False,
    ) -> Tensor:
        """Return the sum [T, D] over each token's local choices.

        Each term of the sum is y + weight·bias. With `weigh_rows`, each term is weight·(y + bias). A bias or
        `weigh_rows` needs the weights.
        """

    def activate(
        self,
        h_NH: Tensor,
        permutation: Permutation,
        weights_TK: Tensor | None,
        bias_LH: Tensor | None,
        config: MoEConfig,
    ) -> Tensor:
        """Return the activation [N, I] of h + bias, times the routing weights if given. H = 2I (ungated I)."""

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
        """Return the gradients of `activate` and, with `again`, its result.

        The three results are the gradient of h [N, H], `activate`'s result [N, I] (None without `again`), and the
        gradient of the weights [T, K] in float32 or, for float64, in float64 (None without weights). With `again`, the
        function may write the first two results over h and `grad_NI`.
        """

    def sum_by_expert(self, rows_NC: Tensor, permutation: Permutation, weights_TK: Tensor | None = None) -> Tensor:
        """Return the sum [L, C] of each expert's rows, each times its routing weight if weights are given.

        The sum is zero for an expert without rows.
        """

    def dot_rows(self, x_TD: Tensor, permutation: Permutation, y_ND: Tensor | None, bias_LD: Tensor | None) -> Tensor:
        """Return, for each choice [T, K], the dot product of the token's x with y + bias of the choice's row.

        Without y or without a bias, the missing term is zero.

        The result is float32 (float64 for float64), and zero for a choice that is not local.
        """


def make_of_steps(device: torch.device, dtype: torch.dtype | None = None) -> Make:
    """Return which implementation runs for a device and dtype.

    Raises ConfigError if EXPERTS_STEPS has a value other than "eager" and "fused".
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "eager", "fused"):
        raise ConfigError(f"{VARIABLE} = {asked!r} in the environment; give 'eager' or 'fused', or leave it out")
    if asked == "eager" or dtype is torch.float64 or device.type not in ("cpu", "cuda"):
        return "eager"
    return "fused" if asked == "fused" or (device.type == "cuda" and _has_triton()) else "eager"


def steps_on(device: torch.device, dtype: torch.dtype | None = None) -> Steps:
    """Return the steps for tensors of a dtype on a device."""
    if make_of_steps(device, dtype) == "fused":
        from experts.steps import fused

        return fused
    from experts.steps import eager

    return eager


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
