"""On a GPU, a profile has the GPU's own time in a call: what prepares the call, and the host, are not in it."""

import statistics

import pytest
import torch

from moebench.measure import profiling, timing
from moebench.measure.timing import TimingPolicy
from moebench.workload.ranks import ALONE

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu():
    return torch.device("cuda", torch.cuda.current_device())


def measured(stages, gpu):
    for stage in stages:
        stage()
    return timing.time_stages(stages, gpu, TimingPolicy(0.005, 0.5))


def busy_of(stages, gpu, num_calls=8, prepare=lambda: None, cold_l2=True):
    for stage in stages:
        stage()
    torch.cuda.synchronize()
    return profiling.busy_of_calls(stages, gpu, num_calls, cold_l2, prepare, ALONE)


def test_the_gpus_own_time_leaves_out_the_host_and_what_prepares_a_call(gpu):
    """The call has two products with a wait of the host between them. They take as long as without the wait."""
    a = torch.randn(4096, 4096, device=gpu, dtype=torch.bfloat16)

    def with_a_wait():
        (a @ a)[0, 0].item()
        host = torch.randn(400, 400)
        for _ in range(20):
            host @ host
        a @ a

    found = busy_of([with_a_wait], gpu, prepare=lambda: a @ a @ a @ a @ a)
    assert found.unknown == ""
    assert len(found.samples_ms) == 8
    plain = measured([lambda: (a @ a, a @ a)], gpu)
    assert statistics.median(found.samples_ms) == pytest.approx(plain.time_ms, rel=0.25)
    waiting = measured([with_a_wait], gpu)
    assert waiting.flags == ("synchronises",)
    assert statistics.median(found.samples_ms) < waiting.time_ms


def test_streams_that_overlap_count_once(gpu):
    a, streams = torch.randn(2048, 2048, device=gpu), [torch.cuda.Stream(gpu) for _ in range(2)]

    def together():
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(gpu))
            with torch.cuda.stream(stream):
                for _ in range(4):
                    a @ a
        for stream in streams:
            torch.cuda.current_stream(gpu).wait_stream(stream)

    found = busy_of([together], gpu)
    assert found.unknown == ""
    assert found.within(measured([together], gpu).time_ms) == found


def test_a_call_that_looks_like_the_marks_leaves_the_time_unknown(gpu):
    assert "marks around 8 calls, not 16" in busy_of([lambda: torch.cuda._sleep(1000)], gpu).unknown
