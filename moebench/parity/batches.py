"""Group the rows of a rank's experts, so that the oracle computes several experts together."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.parity.together import ON_CPU, ON_GPU


@dataclass(frozen=True)
class Batch:
    """G experts that run together, and the M rows of each. An expert with fewer rows is padded.

    A row is one choice of one token. `experts_G` has the experts' numbers on this rank.
    """

    experts_G: Tensor
    tokens_GM: Tensor
    choices_GM: Tensor
    valid_GM: Tensor  # False in the padding

    def rows(self, tensor_TD: Tensor) -> Tensor:
        """Return the rows of the tokens [G, M, D], with zeros in the padding."""
        return torch.where(self.valid_GM.unsqueeze(-1), tensor_TD[self.tokens_GM], 0.0)

    def weights(self, weights_TK: Tensor) -> Tensor:
        """Return the rows' routing weights [G, M], with zeros in the padding."""
        return torch.where(self.valid_GM, weights_TK[self.tokens_GM, self.choices_GM], 0.0)

    def add_rows(self, sums_TD: Tensor, rows_GMD: Tensor) -> None:
        """Add the rows to the tokens' sums."""
        valid = self.valid_GM
        sums_TD.index_add_(0, self.tokens_GM[valid], rows_GMD[valid].to(sums_TD.dtype))

    def put_weights(self, into_TK: Tensor, values_GM: Tensor) -> None:
        """Set the value of each choice."""
        valid = self.valid_GM
        into_TK[self.tokens_GM[valid], self.choices_GM[valid]] = values_GM[valid].to(into_TK.dtype)


def batches(indices_TK: Tensor, first: int, num_local: int, elements: int, by_itself: bool) -> Iterator[Batch]:
    """Yield this rank's experts that have rows, those with similar numbers of rows together.

    The rank's experts are `first` to `first + num_local - 1`. `elements` is the number of elements of one expert's
    matrices. If `by_itself` is true, each expert is a batch of its own.
    """
    local_TK = torch.where(indices_TK >= first, indices_TK - first, num_local).clamp(max=num_local)
    order_N = local_TK.flatten().argsort(stable=True)
    counts_E = local_TK.flatten().bincount(minlength=num_local + 1)
    starts_E = counts_E.cumsum(0) - counts_E
    counts = counts_E[:num_local].tolist()
    by_rows = sorted((expert for expert in range(num_local) if counts[expert]), key=lambda one: -counts[one])
    together = ON_GPU if indices_TK.is_cuda else ON_CPU
    waiting: list[int] = []
    for number, expert in enumerate(by_rows):
        waiting.append(expert)
        is_last = number + 1 == len(by_rows)
        full = len(waiting) >= together.most(counts[waiting[0]], elements)
        if is_last or by_itself or full:
            experts_G = torch.tensor(waiting, device=indices_TK.device)
            steps_M = torch.arange(counts[waiting[0]], device=indices_TK.device)
            valid_GM = steps_M < counts_E[experts_G].unsqueeze(1)
            slots_GM = order_N[torch.where(valid_GM, starts_E[experts_G].unsqueeze(1) + steps_M, 0)]
            num_choices = indices_TK.shape[1]
            yield Batch(experts_G, slots_GM // num_choices, slots_GM % num_choices, valid_GM)
            waiting = []
