"""The parts of a forward on a clock that a test moves: dispatch, compute and combine of the slowest rank."""

from types import SimpleNamespace

import pytest
import torch

from moebench.measure import breakdown as module
from moebench.measure.breakdown import SAMPLES, breakdown
from moebench.workload.case import Case, Job
from moebench.workload.ranks import ALONE

CPU = torch.device("cpu")


class Clock:
    """A clock in seconds; time passes only when a test moves it."""

    def __init__(self):
        self.now_s = 100.0

    def perf_counter(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    moved = Clock()
    monkeypatch.setattr(module, "clock", moved)
    return moved


class Dispatcher:
    """A dispatcher that takes a given time to dispatch and to combine, and keeps its arguments."""

    def __init__(self, clock, dispatch_ms, combine_ms):
        self.clock, self.dispatch_ms, self.combine_ms = clock, iter(dispatch_ms), iter(combine_ms)
        self.handed = []

    def dispatch(self, x, weights, indices):
        self.clock.now_s += next(self.dispatch_ms) / 1e3
        self.handed.append((x, weights, indices))
        return f"sent {x}"

    def combine(self, y, sent):
        self.clock.now_s += next(self.combine_ms) / 1e3
        return y, sent


class Layer:
    """A layer without tensors.

    Its forward takes a little before dispatch and after combine, and a given time to compute.
    """

    around_ms = 0.125

    def __init__(self, clock, dispatch_ms=(1.0,) * SAMPLES, compute_ms=(2.0,) * SAMPLES, combine_ms=(0.5,) * SAMPLES):
        self.clock, self.compute_ms = clock, iter(compute_ms)
        self.dispatcher = Dispatcher(clock, dispatch_ms, combine_ms)
        self.outputs, self.forwards_ms = [], []

    def forward(self):
        start_s = self.clock.now_s
        self.clock.now_s += self.around_ms / 1e3
        sent = self.dispatcher.dispatch("x", "weights", "indices")
        self.clock.now_s += next(self.compute_ms) / 1e3
        self.outputs.append(self.dispatcher.combine("y", sent))
        self.clock.now_s += self.around_ms / 1e3
        self.forwards_ms.append((self.clock.now_s - start_s) * 1e3)


class Others:
    """One rank of two. The other rank has the parts `others` in every sample, and starts `late_ms` late each time."""

    size = ep_size = 2

    def __init__(self, others, clock=None, late_ms=0.0):
        self.others, self.clock, self.late_ms, self.num_aligned = others, clock, late_ms, 0

    def tell(self, value):
        return [value, [self.others] * len(value)]

    def align(self, device):
        self.num_aligned += 1
        if self.clock is not None:
            self.clock.now_s += self.late_ms / 1e3


def parts(dispatch_ms, compute_ms, combine_ms):
    figures = {"dispatch_ms": dispatch_ms, "compute_ms": compute_ms, "combine_ms": combine_ms}
    return pytest.approx(figures, rel=1e-9)


def test_the_parts_add_up_to_the_forward(clock):
    """What the layer does before and after its dispatcher belongs to dispatch and combine."""
    layer = Layer(clock)
    found = breakdown(layer, layer.forward, CPU, Others([0.0, 0.0, 0.0]))
    assert found == parts(1.0 + layer.around_ms, 2.0, 0.5 + layer.around_ms)
    assert sum(found.values()) == pytest.approx(layer.forwards_ms[0])
    assert len(layer.forwards_ms) == SAMPLES


def test_waiting_for_the_other_ranks_to_start_is_in_no_part(clock):
    layer = Layer(clock)
    ranks = Others([0.0, 0.0, 0.0], clock, late_ms=50.0)
    assert breakdown(layer, layer.forward, CPU, ranks) == parts(1.125, 2.0, 0.625)
    assert ranks.num_aligned == SAMPLES


def test_the_parts_are_those_of_the_median_forward_so_that_one_hiccup_is_none(clock):
    hiccup = [1.0] * (SAMPLES - 1) + [1000.0]
    layer = Layer(clock, dispatch_ms=hiccup, compute_ms=hiccup[::-1])
    assert breakdown(layer, layer.forward, CPU, Others([0.0, 0.0, 0.0])) == parts(1.125, 1.0, 0.625)


def test_the_parts_are_those_of_the_rank_that_is_slowest_as_a_whole(clock):
    """Each rank waits in another part for the other rank. The slowest parts of any rank would be 6.75 ms together."""
    layer = Layer(clock)
    assert breakdown(layer, layer.forward, CPU, Others([3.0, 0.25, 1.5])) == parts(3.0, 0.25, 1.5)
    layer = Layer(clock)
    assert breakdown(layer, layer.forward, CPU, Others([2.0, 0.25, 1.0])) == parts(1.125, 2.0, 0.625)


def test_the_slowest_rank_may_change_from_forward_to_forward(clock):
    """The other rank takes 5 ms each time. This rank takes 3.75 ms, and more than 5 ms only in its last forwards."""
    many = SAMPLES // 2 + 1
    layer = Layer(clock, compute_ms=[2.0] * (SAMPLES - many) + [20.0] * many)
    assert breakdown(layer, layer.forward, CPU, Others([1.0, 3.0, 1.0])) == parts(1.125, 20.0, 0.625)


def test_the_layer_computes_what_it_would_without_a_listener(clock):
    layer = Layer(clock)
    dispatcher = layer.dispatcher
    breakdown(layer, layer.forward, CPU, Others([0.0, 0.0, 0.0]))
    assert set(layer.outputs) == {("y", "sent x")}
    assert set(dispatcher.handed) == {("x", "weights", "indices")}
    assert layer.dispatcher is dispatcher


@pytest.mark.parametrize("raises", ["dispatch", "combine"])
def test_the_dispatcher_is_back_in_its_place_after_an_error(clock, monkeypatch, raises):
    layer = Layer(clock)
    dispatcher = layer.dispatcher

    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(dispatcher, raises, fail)
    with pytest.raises(ZeroDivisionError):
        breakdown(layer, layer.forward, CPU, Others([0.0, 0.0, 0.0]))
    assert layer.dispatcher is dispatcher


def test_on_a_gpu_the_pass_is_handed_over_while_the_gpu_is_busy(clock, monkeypatch):
    """The wait is behind `prepare` and before the ranks start together."""
    happened = []
    monkeypatch.setattr(module, "keep_busy", lambda wait_ms: happened.append(wait_ms))
    monkeypatch.setattr(clock, "mark", clock.perf_counter, raising=False)
    monkeypatch.setattr(clock, "ms_between", lambda start, end: (end - start) * 1e3, raising=False)
    monkeypatch.setattr(clock, "wait_for", lambda mark: None, raising=False)
    ranks, layer = Others([0.0, 0.0, 0.0]), Layer(clock)
    monkeypatch.setattr(ranks, "align", lambda device: happened.append("start"))
    cuda, prepare = torch.device("cuda"), lambda: happened.append("prepare")
    assert breakdown(layer, layer.forward, cuda, ranks, prepare, hidden_ms=3.5) == parts(1.125, 2.0, 0.625)
    assert happened == ["prepare", 3.5, "start"] * SAMPLES


class Sends:
    """A dispatcher of tokens of 2048 values in bfloat16, whose rows have a number of bytes on their way."""

    #: Of four experts, the first rank has two. Three tokens go to the second rank, which holds the others.
    indices = torch.tensor([[0, 1], [1, 2], [2, 3], [-1, -1], [3, 0]])

    def __init__(self, row_bytes):
        self.row_bytes, self.dispatcher = row_bytes, self

    def dispatch(self, x, weights, indices):
        return SimpleNamespace(row_bytes=self.row_bytes)

    def combine(self, y, sent):
        return y

    def forward(self):
        x = torch.zeros(5, 2048, dtype=torch.bfloat16)
        self.dispatcher.combine("y", self.dispatcher.dispatch(x, None, self.indices))


@pytest.mark.parametrize(
    ("dispatcher", "row_bytes", "num_bytes"),
    [("symm_mem", 2112, 3 * 2112), ("alltoall", None, 3 * 4096), ("allgather", None, 5 * 4096)],
)
def test_the_bytes_of_a_dispatch_are_those_of_rows_that_leave_the_rank(clock, dispatcher, row_bytes, num_bytes):
    """Rows in FP8 have 2048 values and 16 scales, 0.516 times the bytes. The other rank sends less here."""
    ranks = Others([0.0, 0.0, 0.0])
    ranks.sharing, ranks.rank, ranks.ep_rank, ranks.largest = ranks, 0, 0, lambda value: value
    case = Case(num_tokens=5, n_routed_experts=4, n_activated_experts=2, dim=2048, moe_inter_dim=16, ep_size=2)
    layer = Sends(row_bytes)
    ranks.tell = lambda value: [value, [0, 0] if isinstance(value[0], int) else [[0.0, 0.0, 0.0]] * len(value)]
    job = Job(case=case, backend="triton_fp8", dispatcher=dispatcher)
    assert breakdown(layer, layer.forward, CPU, ranks, job=job)["dispatch_bytes"] == num_bytes


def test_alone_and_without_a_dispatcher_there_are_no_parts_and_no_call(clock):
    layer = Layer(clock)
    assert breakdown(layer, layer.forward, CPU, ALONE) == {}
    assert breakdown(SimpleNamespace(), layer.forward, CPU, Others([0.0, 0.0, 0.0])) == {}
    assert layer.forwards_ms == []
