"""Compile a layer with torch.compile, and count what the compiler did."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Counts:
    """The graphs that were compiled, and the places where the compiler went back to Python."""

    graphs: int
    breaks: int


class Graphs:
    """The compiler's counts for one layer. A layer that would fall back to eager execution raises instead."""

    def __init__(self) -> None:
        import torch._dynamo

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self._first: Counts | None = None
        self._warm = Counts(0, 0)

    def compile(self, layer: nn.Module) -> None:
        """Compile the layer's forward. What FSDP does around it stays outside."""
        layer.forward = torch.compile(layer.forward)

    def counts(self) -> Counts:
        """Return the counts until now."""
        from torch._dynamo.utils import counters

        return Counts(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))

    def end_pass(self) -> None:
        """After the first pass, take the graphs until now as those of the first pass."""
        self._first = self._first or self.counts()

    def end_warm_calls(self) -> None:
        """Take the graphs until now as those of warm calls. The profiler may make torch compile anew."""
        self._warm = self.counts()

    @property
    def columns(self) -> dict[str, int]:
        """The columns of a row about the compiler."""
        assert self._first is not None
        return {
            "compiled_graphs": self._first.graphs,
            "graph_breaks": self._first.breaks,
            "recompiled_graphs": self.counts().graphs - self._warm.graphs,
        }
