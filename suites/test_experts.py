"""Run one test per job. The test measures as `moebench run` does, and gives each sample to pytest-benchmark.

The test fails if the backend's result is wrong. It is skipped, with the reason, if the backend cannot run the case here
or runs out of memory.
"""

import dataclasses

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from moebench.measure.cache import Workload
from moebench.measure.subject import Measured
from moebench.measure.timing import TimingPolicy
from moebench.measure.worker import run_job
from moebench.results.record import GOOD, Status
from moebench.workload.case import Job

#: The columns that pytest-benchmark saves with the times. docs/results.md explains each column.
EXTRA_INFO = (
    *("gpu", "executed", "flags", "l2", "converged", "tokens_per_s", "tflops", "host_time_ms", "busy_ms"),
    *("backward_ms", "warmup_ms", "peak_memory_bytes", "saved_memory_bytes", "parity_worst", "parity_worst_tensor"),
)


class Replay:
    """Calls and a clock for pytest-benchmark. By this clock, each call takes as long as one measured sample."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def clock_s(self) -> float:
        return self._now_s

    def start(self) -> None:
        self._now_s = 0.0  # from zero, so that the difference of two readings is exactly the sample

    def call(self) -> None:
        self._now_s = next(self._durations_s)

    def into(self, benchmark: BenchmarkFixture, samples_ms: tuple[float, ...]) -> None:
        self._durations_s = (sample_ms / 1e3 for sample_ms in samples_ms)
        benchmark.pedantic(self.call, setup=self.start, rounds=len(samples_ms))


REPLAY = Replay()


@pytest.mark.benchmark(timer=REPLAY.clock_s)
def test_job(job: Job, workload: Workload, policy: TimingPolicy, benchmark: BenchmarkFixture) -> None:
    if job.case.ep_size > 1:
        pytest.skip(f"ep_size = {job.case.ep_size} needs as many processes: measure it with `moebench run`")
    if benchmark.disabled:  # check parity, do not time
        policy = dataclasses.replace(policy, time_cap_s=0.0)
    measured = run_job(job, workload, policy)
    if measured["status"] is not Status.ok:
        _end(measured, workload)
    benchmark.group = job.case.case_id
    benchmark.extra_info.update(_extra_info(job, measured, workload.device))
    REPLAY.into(benchmark, measured["samples_ms"])


def _end(measured: Measured, workload: Workload) -> None:
    """Skip or fail the test, depending on the status."""
    workload.forget()
    if workload.device.type == "cuda":
        torch.cuda.empty_cache()
    reason = f"{measured['status'].value}: {measured['detail']}"
    if measured["status"] in GOOD:
        pytest.skip(reason)
    pytest.fail(reason, pytrace=False)


def _extra_info(job: Job, measured: Measured, device: torch.device) -> Measured:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    found = {"case_id": job.case.case_id, "backend": job.backend, "dispatcher": job.dispatcher}
    return found | {name: (measured | {"gpu": gpu})[name] for name in EXTRA_INFO}
