"""What backward computes again is compared with what forward computed, bit for bit."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moebench.measure.context.watch import Watch

NAMES = ["rows", "weights of rows", "indices of rows"]


class Layer:
    """A function from rows to sums. `change` replaces what backward reads."""

    def __init__(self, change=lambda x, weights, indices: (x, weights, indices)):
        self.watch, self.change, self.factor = Watch(), change, 1.0
        self.compute = self.watch.rows_of(lambda x, weights, indices: x * weights.sum(dim=1, keepdim=True))
        self.run = self.watch.output_of(self.forward)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        in_backward = torch._C._current_graph_task_id() >= 0
        given = self.change(x, weights, indices) if in_backward else (x, weights, indices)
        return self.compute(*given) * (self.factor if in_backward else 1.0)


def train(layer: Layer, use_reentrant: bool = False, indices: Tensor | None = None) -> None:
    x = torch.arange(8.0).view(4, 2).requires_grad_()
    weights, indices = torch.ones(4, 2), torch.ones(4, 2, dtype=torch.int64) if indices is None else indices
    with layer.watch.on():
        checkpoint(layer.run, x, weights, indices, use_reentrant=use_reentrant, early_stop=False).sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_rows_of_forward_are_no_error(use_reentrant: bool) -> None:
    layer = Layer()
    train(layer, use_reentrant)
    assert [(one.tensor, one.error, one.where) for one in layer.watch.errors()] == [
        (name, 0.0, "recomputed") for name in NAMES
    ]
    assert layer.watch.outputs_again() == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows", lambda x, w, i: (x + 1e-6, w, i)),
        ("rows", lambda x, w, i: (x.flip(0), w, i)),
        ("weights of rows", lambda x, w, i: (x, w * 1.000001, i)),
        ("indices of rows", lambda x, w, i: (x, w, i + 1)),
    ],
)
def test_a_tensor_of_the_rows_with_other_bits_is_an_infinite_error(name: str, change: object) -> None:
    layer = Layer(change)
    train(layer)
    errors = {one.tensor: one.error for one in layer.watch.errors()}
    assert errors == {other: math.inf if other == name else 0.0 for other in NAMES}


def test_another_number_of_rows_is_an_error_of_every_tensor() -> None:
    layer = Layer()
    layer.change = lambda x, w, i: (x, w, torch.full_like(i, -1))
    train(layer)
    assert all(math.isinf(one.error) for one in layer.watch.errors())


def test_rows_without_a_choice_may_hold_anything() -> None:
    nobody = torch.tensor([[1, 1], [-1, -1], [0, -1], [-1, -1]])
    layer = Layer(lambda x, w, i: (x + torch.where((i >= 0).any(dim=1, keepdim=True), 0.0, math.nan), w, i))
    train(layer, indices=nobody)
    assert [one.error for one in layer.watch.errors()] == [0.0, 0.0, 0.0]


def test_an_output_with_other_bits_is_kept_to_be_judged() -> None:
    layer = Layer()
    layer.factor = 1.5
    train(layer)
    (again,) = layer.watch.outputs_again()
    assert torch.equal(again, 3 * torch.arange(8.0).view(4, 2))


def test_a_pass_that_is_not_watched_leaves_nothing() -> None:
    layer = Layer(lambda x, w, i: (x + 1, w, i))
    train(layer)
    with layer.watch.on():
        layer.run(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    assert layer.watch.errors() == []
    assert layer.watch.outputs_again() == []
