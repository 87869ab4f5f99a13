"""Watch what backward computes again: whether its rows are the rows of forward, and what comes out.

In backward, a function that is checkpointed runs again. It must get the rows that it got in forward, bit for bit, and
its output is judged like the output of forward.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moebench.parity.judge import TensorError, are_identical
from moebench.parity.reference import Tensors

Compute = Callable[..., Tensor]


@dataclass
class Seen:
    """What a pass computed in forward, and what it computed again, each in the order of the calls.

    `rows` has the rows of the experts with their choices, without rows that have no choice, because nobody reads them.
    `outputs` has what the checkpointed function returned.
    """

    rows: list[Tensors] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class Watch:
    """Records the calls of a layer's functions while it is on. It is on for the passes that are checked, not timed."""

    def __init__(self) -> None:
        self.is_on = False
        self.forward, self.backward = Seen(), Seen()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Record a new pass."""
        self.forward, self.backward = Seen(), Seen()
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False

    @property
    def _seen(self) -> Seen:
        return self.backward if torch._C._current_graph_task_id() >= 0 else self.forward

    def rows_of(self, compute: Compute) -> Compute:
        """Return the layer's function from rows to their sums, watched."""

        def watched(x_RD: Tensor, weights_RK: Tensor, indices_RK: Tensor) -> Tensor:
            if self.is_on:
                with torch.no_grad():
                    read = (indices_RK >= 0).any(dim=1)
                    named = {"rows": x_RD, "weights of rows": weights_RK, "indices of rows": indices_RK}
                    self._seen.rows.append({name: tensor.detach()[read] for name, tensor in named.items()})
            return compute(x_RD, weights_RK, indices_RK)

        return watched

    def output_of(self, function: Compute) -> Compute:
        """Return a function that is checkpointed, watched."""

        def watched(*tensors: Tensor) -> Tensor:
            output = function(*tensors)
            if self.is_on:
                self._seen.outputs.append(output.detach().clone())
            return output

        return watched

    def errors(self) -> list[TensorError]:
        """Return an error for each tensor of the rows that backward read: infinite if a bit differs from forward."""
        if not self.backward.rows:
            return []
        pairs = list(zip(self.forward.rows, self.backward.rows, strict=False))
        found = []
        for name in ("rows", "weights of rows", "indices of rows"):
            same = len(self.forward.rows) == len(self.backward.rows) and all(
                are_identical([{name: before[name]}, {name: after[name]}]) for before, after in pairs
            )
            what = "recomputed" if same else "recomputed, which are not those of forward"
            found.append(TensorError(name, what, 0.0 if same else math.inf, 1.0))
        return found

    def outputs_again(self) -> list[Tensor]:
        """Return the outputs that differ from those of forward, where a function ran again; empty if none differs."""
        before, after = self.forward.outputs, self.backward.outputs
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        return [] if same or not after else after
