"""Which layouts of the weights in FP8 a layer keeps, and what CUDA graphs find there.

Captures are only told to the cache here: the kernels run, but a test may take away what they wrote. test_triton_fp8.py
has real graphs. test_fp8.py runs this file in Triton's interpreter.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from experts import GroupedExperts
from experts.config import Save
from experts.fp8 import cache as cache_module
from experts.fp8.blocks import Matrices
from experts.fp8.quantise import transposed
from tests.experts.test_triton_fp8 import made, on_every_setup, some

pytest.importorskip("triton")


class Steps:
    """A small layer with tokens, and calls of it."""

    def __init__(self, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, save: Save = "memory") -> None:
        config, self.parameters, batch = some(dtype, "swiglu", n_routed_experts=2, dim=32, moe_inter_dim=16)
        self._made: Callable[[dict[str, Tensor]], GroupedExperts] = lambda parameters: made(
            "block_float32", config, parameters, device, save=save
        )
        self.layer = self._made(self.parameters)
        self.given = batch.map(lambda tensor: tensor.to(device))
        self._monkeypatch = monkeypatch

    def forward(self, layer: GroupedExperts | None = None) -> Tensor:
        """Return the output of a call without gradients."""
        with torch.no_grad():
            return self._call(layer or self.layer)

    def train(self) -> Tensor:
        """Return the output of a forward pass that backward has followed."""
        output = self._call(self.layer)
        output.backward(self.given.grad)
        return output.detach()

    def _call(self, layer: GroupedExperts) -> Tensor:
        output: Tensor = layer(self.given.x, self.given.token_mask, self.given.weights, self.given.indices)
        return output

    def captured(self, step: Callable[[], Tensor]) -> None:
        with self._monkeypatch.context() as patched:
            patched.setattr(cache_module, "_is_captured", lambda tensor: True)
            step()

    def change(self) -> Tensor:
        """Give the layer other weights, and return what a new layer with them returns."""
        others = {name: -2 * tensor for name, tensor in self.parameters.items()}
        self.layer.load_state_dict(others)
        return self.forward(self._made(others))

    def kept(self) -> Iterator[tuple[Matrices | None, Matrices | None]]:
        assert self.layer.weight_cache is not None
        for one in (self.layer.weight_cache._up, self.layer.weight_cache._down):
            yield one._forward, one._back

    def places(self) -> list[list[int | None]]:
        return [[None if one is None else one.values.data_ptr() for one in pair] for pair in self.kept()]


@on_every_setup
def test_a_call_keeps_the_layout_that_it_reads_last(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(device, dtype, monkeypatch)
    steps.forward()
    assert all(forward is not None and back is None for forward, back in steps.kept())
    steps.train()
    assert all(forward is None and back is not None for forward, back in steps.kept())
    before = steps.places()
    steps.layer.weights_changed()
    steps.train()
    assert steps.places() == before, "other weights overwrite the memory"
    steps.forward()
    assert all(forward is not None and back is None for forward, back in steps.kept())


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("captured", ["forward", "train"])
@on_every_setup
def test_nothing_that_a_graph_may_read_or_write_is_freed(
    device: str, dtype: torch.dtype, captured: str, changed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(device, dtype, monkeypatch)
    step = steps.forward if captured == "forward" else steps.train
    step()
    if changed:
        steps.layer.weights_changed()
    steps.captured(step)
    before = steps.places()
    steps.forward()
    steps.train()
    steps.forward()
    for places, earlier in zip(steps.places(), before, strict=True):
        assert [new for new, old in zip(places, earlier, strict=True) if old not in (None, new)] == []


@on_every_setup
def test_after_a_capture_every_layout_gets_new_weights(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that transposes a layout of backward with old weights would write them into the other layout."""
    steps = Steps(device, dtype, monkeypatch)
    steps.train()
    steps.captured(steps.forward)
    right = steps.change()
    assert torch.equal(steps.forward(), right)
    for forward, back in steps.kept():
        assert forward is not None
        assert back is not None
        assert torch.equal(transposed(forward).values.float(), back.values.float())


@on_every_setup
def test_what_a_captured_call_has_not_written_yet_is_not_read(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(device, dtype, monkeypatch)
    right = steps.train()
    steps.captured(steps.forward)
    for forward, _ in steps.kept():
        assert forward is not None
        forward.values.view(torch.uint8).fill_(0)
    assert torch.equal(steps.forward(), right)


@pytest.mark.parametrize("save", ["memory", "time"])
@on_every_setup
def test_backward_refuses_weights_that_are_not_those_of_its_forward_pass(
    device: str, dtype: torch.dtype, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd does not see it where the parameters have another dtype than x: it saves the copies."""
    steps = Steps(device, dtype, monkeypatch, save)
    steps.layer.float()
    output = steps._call(steps.layer)
    with torch.no_grad():
        steps.layer.down_projs *= 2
    steps.layer.weights_changed()
    steps.train()
    with pytest.raises(RuntimeError, match="quantised its weights again since this forward pass"):
        output.backward(steps.given.grad)
