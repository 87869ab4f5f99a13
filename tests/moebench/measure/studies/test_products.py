"""A backend's products in moebench.measure.studies.products are the products of its layer, with the same operations."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experts.steps import steps_on
from moebench.measure.studies.products import BACKENDS, CountedCall, layer_of, of_backend, passes
from moebench.workload.case import Case
from moebench.workload.inputs import make_inputs, make_parameters, moe_config
from tests.experts import fakes

CPU = torch.device("cpu")
CASE = Case(
    num_tokens=24,
    n_routed_experts=4,
    n_activated_experts=2,
    dim=32,
    moe_inter_dim=16,
    dtype="bfloat16",
    expert_activation="quick_geglu",
    expert_bias=True,
)
FORWARD_FLOPS = 6 * 48 * 32 * 16
on_every_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])  # needs a GPU


@pytest.fixture(autouse=True)
def fake_libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fakes.install(monkeypatch)
    yield
    fakes.library.not_installed.cache_clear()
    fakes.library.takes_sizes_on_device.cache_clear()


@torch.no_grad()
def works_of(backend: str) -> list[CountedCall]:
    config, inputs, parameters = moe_config(CASE), make_inputs(CASE, CPU), make_parameters(CASE, CPU)
    rows = steps_on(CPU).sort_by_expert(inputs.indices_TK, 0, 4)
    return list(of_backend(backend, inputs, parameters, config, rows))


@on_every_backend
def test_calls_do_the_operations_that_they_are_timed_by(backend: str) -> None:
    works = works_of(backend)
    expected = [FORWARD_FLOPS, FORWARD_FLOPS, 3 * FORWARD_FLOPS, 3 * FORWARD_FLOPS]
    assert [work.num_flops for work in works] == expected
    assert [work.name.partition(": ")[0] for work in works] == [backend] * 4
    if backend.startswith("torch_mm"):
        return  # on a CPU grouped_mm is one operation, and torch's counter does not know it
    for work in works:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work.call()
        assert counter.get_total_flops() == work.num_flops


def test_transformer_engine_is_called_in_both_ways_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(work.other is None for work in works_of("te")), "this cuBLASLt takes sizes on the host"
    monkeypatch.setattr(fakes.fake_transformer_engine.Gpu, "multiplies_groups", True)
    fakes.library.takes_sizes_on_device.cache_clear()
    assert all(work.other is None for work in works_of("gmm"))
    others = [work.other for work in works_of("te")]
    assert [other is None for other in others] == [False, True] * 2, "only the products have two ways"
    for other, flops in ((others[0], FORWARD_FLOPS), (others[2], 3 * FORWARD_FLOPS)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            other()
        assert counter.get_total_flops() == flops


@on_every_backend
def test_a_train_step_leaves_the_gradients_of_one_step(backend: str) -> None:
    """If a step added to the last step's gradients, its time would include the addition."""
    config, inputs, parameters = moe_config(CASE), make_inputs(CASE, CPU), make_parameters(CASE, CPU)
    layer = layer_of(backend, parameters, config)
    _, train = passes(layer, inputs)
    train()
    first = {name: grad.clone() for name, grad in layer.stacked_grads().items()}
    train()
    assert first
    for name, grad in layer.stacked_grads().items():
        assert torch.equal(grad, first[name]), name


def test_layers_share_the_memory_of_their_parameters() -> None:
    config, parameters = moe_config(CASE), make_parameters(CASE, CPU)
    for backend in ("torch_mm", "triton"):
        own = dict(layer_of(backend, parameters, config).named_parameters())
        assert {name: own[name].data_ptr() for name in parameters} == {
            name: tensor.data_ptr() for name, tensor in parameters.items()
        }
