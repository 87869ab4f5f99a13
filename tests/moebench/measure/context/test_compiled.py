"""What the compiler did is counted: graphs of the first pass, breaks in it, and graphs that come later.

The backend of torch.compile is `eager`, a stand-in for inductor: it runs the graphs that torch found as they are.
"""

import functools

import pytest
import torch
from torch import Tensor, nn

from moebench.measure.context.compiled import Graphs


class Breaks(nn.Module):
    """A layer in two graphs, because the host looks at a value between them."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        if float(x.sum()) > 0:
            return x + 1
        return x - 1


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    return Graphs()


@pytest.mark.parametrize(("layer", "expected"), [(Whole(), (1, 0)), (Breaks(), (2, 1))], ids=["whole", "breaks"])
def test_graphs_and_breaks_of_the_first_pass_are_counted(
    graphs: Graphs, layer: nn.Module, expected: tuple[int, int]
) -> None:
    graphs.compile(layer)
    for _ in range(3):
        assert torch.equal(layer(torch.ones(4)), torch.full((4,), 3.0))
        graphs.end_pass()
    graphs.end_warm_calls()
    layer(torch.ones(4))
    assert graphs.columns == {"compiled_graphs": expected[0], "graph_breaks": expected[1], "recompiled_graphs": 0}


def test_another_number_of_tokens_is_a_recompilation(graphs: Graphs) -> None:
    layer = Whole()
    graphs.compile(layer)
    layer(torch.ones(4))
    graphs.end_pass()
    graphs.end_warm_calls()
    layer(torch.ones(3))
    assert graphs.columns["recompiled_graphs"] == 1


def test_a_layer_that_falls_back_to_eager_raises(graphs: Graphs) -> None:
    class Constant(nn.Module):
        number = 0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.number

    layer = Constant()
    graphs.compile(layer)
    with pytest.raises(Exception, match="recompile_limit"):  # noqa: PT012  torch decides after how many
        for number in range(20):
            layer.number = number
            layer(torch.full((2,), 1.0 + number))
