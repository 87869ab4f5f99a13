"""measure_memory finds known allocations to the byte."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from moebench.measure.memory import Held, Memory, StorageTracker, largest, measure_memory, storage_tracker
from tests.moebench.measure.two_ranks import Two

CPU = torch.device("cpu")
KIB = 1024


def kib(count):
    """Return a tensor of that many KiB, allocated in this call."""
    return torch.zeros(count * KIB // 4)


def test_live_and_peak_bytes_of_tensors_that_come_and_go():
    with StorageTracker() as tracker:
        a = kib(4)
        assert (tracker.live_bytes, tracker.peak_bytes) == (4 * KIB, 4 * KIB)
        b = kib(8)
        assert tracker.live_bytes == 12 * KIB
        del a
        assert (tracker.live_bytes, tracker.peak_bytes) == (8 * KIB, 12 * KIB)
        c = kib(2)
        assert (tracker.live_bytes, tracker.peak_bytes) == (10 * KIB, 12 * KIB)
        del b, c
        assert (tracker.live_bytes, tracker.peak_bytes) == (0, 12 * KIB)


def test_views_and_in_place_operators_allocate_nothing():
    with StorageTracker() as tracker:
        a = kib(4)
        views = [a.view(2, -1), a[3:], a.detach(), a.unsqueeze(0).transpose(0, 1)]
        a.add_(1).mul_(2)
        a[:5] = 1
        torch.add(a, 1, out=a)
        assert tracker.peak_bytes == 4 * KIB
        del a
        assert tracker.live_bytes == 4 * KIB, "a view keeps its storage"
        del views
        assert tracker.live_bytes == 0


def test_a_view_counts_once_with_the_whole_of_its_storage():
    with StorageTracker() as tracker:
        part = kib(4)[:1]
        assert tracker.live_bytes == 4 * KIB
        del part
        assert tracker.live_bytes == 0


def test_what_was_there_before_does_not_count():
    before = kib(64)
    with StorageTracker() as tracker:
        before.add_(1)
        before = before.view(-1)
        del before
        assert (tracker.live_bytes, tracker.peak_bytes) == (0, 0)


def test_operators_with_several_results():
    with StorageTracker() as tracker:
        values, order = kib(4).sort()
        assert tracker.live_bytes == values.nbytes + order.nbytes == 4 * KIB + 8 * KIB
        parts = values.chunk(4)
        assert tracker.live_bytes == 12 * KIB
        assert len(parts) == 4


def test_dtypes_count_by_their_bytes():
    for dtype, itemsize in ((torch.bfloat16, 2), (torch.float64, 8), (torch.bool, 1)):
        with StorageTracker() as tracker:
            kept = torch.zeros(1000, dtype=dtype)
            assert tracker.live_bytes == 1000 * itemsize == kept.nbytes


def test_a_tensor_that_grows_in_place():
    with StorageTracker() as tracker:
        a = torch.empty(0)
        a.resize_(4 * KIB)
        assert (tracker.live_bytes, tracker.peak_bytes) == (16 * KIB, 16 * KIB)
        a.resize_(KIB)
        assert tracker.live_bytes == 16 * KIB, "a smaller tensor keeps its storage"
        del a
        assert (tracker.live_bytes, tracker.peak_bytes) == (0, 16 * KIB)


def test_a_view_that_grows_its_storage():
    with StorageTracker() as tracker:
        a = kib(4)
        view = a[: KIB // 2]
        view.resize_(4 * KIB)
        assert tracker.live_bytes == a.untyped_storage().nbytes() == 16 * KIB
        del view
        assert tracker.live_bytes == 16 * KIB
        del a
        assert tracker.live_bytes == 0


def test_results_written_to_empty_tensors():
    """The product has 16 KiB, as its operand has."""
    with StorageTracker() as tracker:
        a = torch.ones(64, 64)
        product = torch.mm(a, a, out=torch.empty(0))
        assert (tracker.live_bytes, tracker.peak_bytes) == (32 * KIB, 32 * KIB)
        values, order = torch.empty(0), torch.empty(0, dtype=torch.int64)
        torch.sort(a, out=(values, order))
        assert tracker.live_bytes == (32 + 16 + 32) * KIB
        del product
        assert tracker.live_bytes == (16 + 16 + 32) * KIB


def test_a_storage_that_is_freed_and_filled_again():
    """At most one of the two tensors has memory at a time."""
    with StorageTracker() as tracker:
        a = kib(64)
        a.untyped_storage().resize_(0)
        assert tracker.live_bytes == 0
        b = kib(64)
        assert (tracker.live_bytes, tracker.peak_bytes) == (64 * KIB, 64 * KIB)
        b.untyped_storage().resize_(0)
        a.untyped_storage().resize_(64 * KIB)
        assert (tracker.live_bytes, tracker.peak_bytes) == (64 * KIB, 64 * KIB)
        del a, b
        assert (tracker.live_bytes, tracker.peak_bytes) == (0, 64 * KIB)


def test_a_tensor_that_takes_the_storage_of_another():
    with StorageTracker() as tracker:
        a, b = kib(4), kib(8)
        a.set_(b)
        assert (tracker.live_bytes, tracker.peak_bytes) == (8 * KIB, 12 * KIB)
        del b
        assert tracker.live_bytes == 8 * KIB
        a.set_(kib(2).untyped_storage(), 0, (4 * KIB,))
        assert tracker.live_bytes == 16 * KIB, "set_ grows a storage that is too small"


def test_lists_of_tensors():
    with StorageTracker() as tracker:
        tensors = [kib(4), kib(8)]
        torch._foreach_add_(tensors, 1)
        assert tracker.live_bytes == 12 * KIB
        sums = torch._foreach_add(tensors, 1)
        assert tracker.live_bytes == 24 * KIB
        del tensors
        assert (tracker.live_bytes, len(sums)) == (12 * KIB, 2)


def test_older_storages_count_by_their_growth():
    before, other, freed = kib(4), torch.empty(0), kib(32)
    with StorageTracker() as tracker:
        before.resize_(4 * KIB)
        assert tracker.live_bytes == 12 * KIB
        torch.add(before[:KIB], 1, out=other)
        assert tracker.live_bytes == (12 + 4) * KIB
        freed.untyped_storage().resize_(0)
        freed.untyped_storage().resize_(32 * KIB)
        assert (tracker.live_bytes, tracker.peak_bytes) == (16 * KIB, 16 * KIB)
        freed.untyped_storage().resize_(40 * KIB)
        assert tracker.live_bytes == 24 * KIB
        del before, other, freed
        assert (tracker.live_bytes, tracker.peak_bytes) == (0, 24 * KIB)


def test_after_the_tracker_a_resize_is_torchs_own():
    resize = torch.UntypedStorage.resize_
    with StorageTracker() as outer, StorageTracker() as inner:
        kept = kib(4)
        kept.untyped_storage().resize_(8 * KIB)
        assert outer.live_bytes == inner.live_bytes == 8 * KIB
    kept.untyped_storage().resize_(16 * KIB)
    assert outer.live_bytes == inner.live_bytes == 8 * KIB
    assert torch.UntypedStorage.resize_ is resize


@pytest.mark.parametrize("again", range(2))
def test_forward_alone(again):
    def forward():
        first = kib(16)
        second = first + 1
        del first
        return second[: KIB // 4] + 1

    assert measure_memory(forward, None, CPU).peak_bytes == 32 * KIB
    assert measure_memory(forward, None, CPU).saved_bytes is None


def test_what_forward_saves_for_backward():
    """exp keeps its result of 8 KiB. Multiplication by a number keeps nothing. The output belongs to the caller."""
    x = torch.zeros(2 * KIB, requires_grad=True)
    measured = measure_memory(lambda: x.exp() * 2, lambda output: output.backward(torch.ones(2 * KIB)), CPU)
    assert measured.saved_bytes == 8 * KIB


def test_nothing_is_saved_where_nothing_is_kept():
    x = torch.zeros(2 * KIB, requires_grad=True)
    measured = measure_memory(lambda: (x + 1) * 2, lambda output: output.backward(torch.ones(2 * KIB)), CPU)
    assert measured.saved_bytes == 0


def test_backward_counts_into_the_peak():
    """The peak is 24 KiB: output 8, its gradient 8, and the gradient of x 8, which stays. Forward had 8."""
    x = torch.zeros(2 * KIB, requires_grad=True)
    measured = measure_memory(lambda: x * 2, lambda output: output.backward(torch.ones(2 * KIB)), CPU)
    assert (measured.peak_bytes, measured.saved_bytes) == (24 * KIB, 0)
    assert x.grad is not None


def test_parameters_and_inputs_are_in_the_floor():
    layer = nn.Linear(256, 256, bias=False)
    x = torch.zeros(16, 256)
    with torch.no_grad():
        assert measure_memory(lambda: layer(x), None, CPU).peak_bytes == 16 * 256 * 4


def test_a_linear_layer_saves_nothing_of_its_own_and_its_backward_writes_both_gradients():
    layer = nn.Linear(256, 256, bias=False)
    x = torch.zeros(16, 256, requires_grad=True)
    grad = torch.ones(16, 256)
    measured = measure_memory(lambda: layer(x), lambda output: output.backward(grad), CPU)
    assert measured.saved_bytes == 0
    assert measured.peak_bytes == (16 * 256 + 16 * 256 + 256 * 256) * 4


def test_only_memory_of_the_call_is_counted_not_of_those_before():
    kept = []

    def forward():
        kept.append(kib(4))
        return kept[-1]

    assert [measure_memory(forward, None, CPU).peak_bytes for _ in range(3)] == [4 * KIB] * 3


MIB = 2**20


def test_arrays_of_numpy_are_found_where_the_kernel_tells():
    """Within half of their size: the resident memory of a process is coarse."""

    def forward():
        np.ones(128 * MIB // 8).sum()  # it is free when the call ends
        return kib(4)

    untracked = measure_memory(forward, None, CPU).untracked_bytes
    if untracked is None:
        pytest.skip("the kernel does not tell the peak of the resident memory")
    assert abs(untracked - 128 * MIB) < 64 * MIB
    assert measure_memory(lambda: kib(4), None, CPU).untracked_bytes < 64 * MIB


def test_what_is_held_does_not_count_tensors():
    held = Held(CPU)
    tensors = [torch.ones(128 * MIB // 4)]
    layer = nn.Linear(4096, 4096)
    assert held.bytes_beside(layer, tensors) < 64 * MIB
    array = np.ones(128 * MIB // 8)
    assert abs(held.bytes_beside(layer, tensors) - array.nbytes) < 64 * MIB


def test_memory_is_that_of_the_rank_that_needs_most_figure_by_figure():
    layer = nn.Linear(1, 1)
    assert largest(Memory(100, 7, None), None, Two(Memory(50, 30, None, None, 3)), layer) == {
        "peak_memory_bytes": 100,
        "saved_memory_bytes": 30,
        "cached_weight_bytes": None,
        "reserved_memory_bytes": None,
        "outside_torch_bytes": None,
        "untracked_memory_bytes": 3,
    }
    assert largest(Memory(1, None, None, 5), None, Two(Memory(2, None, None, 4)), layer)["outside_torch_bytes"] == 5


def test_where_the_compiler_is_in_use_it_stays_out_of_the_tracker(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert type(storage_tracker()) is StorageTracker
    monkeypatch.undo()
    import torch._dynamo

    for tracker in (storage_tracker(), StorageTracker()):
        with tracker:
            torch.ones(64)
        assert tracker.peak_bytes == 256
    assert type(storage_tracker()) is not StorageTracker
    assert storage_tracker()._should_skip_dynamo()
