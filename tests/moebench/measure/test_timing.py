"""Run the sampler on a test's own clock: what it times, what it leaves out, and when it stops."""

import gc
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moebench.machine.nvml import Clock
from moebench.measure import samplers, timing
from moebench.measure.samplers import Group
from moebench.measure.timing import BATCH, CONVERGED_SAMPLES, TimingPolicy, time_stages
from moebench.results.stats import MIN_SAMPLES, relative_half_width, series_interval
from moebench.workload.ranks import ALONE
from tests.moebench.measure.two_ranks import Two

CPU = torch.device("cpu")
MS = 1_000_000


class Watch:
    """A clock that only a test's stages move."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9


@pytest.fixture
def clock(monkeypatch):
    clock = Watch()
    faked = SimpleNamespace(perf_counter=clock.perf_counter, perf_counter_ns=clock.perf_counter_ns)
    for module in (timing, samplers):
        monkeypatch.setattr(module, "clock", faked)
    return clock


def stage(clock, *durations_ms, calls=None, name="stage"):
    """Return a stage that takes these durations in turn, repeatedly, and notes its calls."""
    durations = itertools.cycle(durations_ms)

    def run():
        clock.now_ns += round(next(durations) * MS)
        if calls is not None:
            calls.append(name)

    return run


def policy(target=0.02, cap_s=10.0):
    return TimingPolicy(interval_target=target, time_cap_s=cap_s)


def test_constant_durations_converge_as_soon_as_that_is_no_chance(clock):
    found = time_stages([stage(clock, 2.0)], CPU, policy())
    assert set(found.samples_ms) == {2.0}
    assert CONVERGED_SAMPLES <= len(found.samples_ms) < CONVERGED_SAMPLES + BATCH
    assert (found.time_ms, found.time_ms_low, found.time_ms_high) == (2.0, 2.0, 2.0)
    assert found.converged
    assert found.host_time_ms == 2.0
    assert found.flags == ()


def test_a_call_is_the_sum_of_its_stages_and_each_has_its_median(clock):
    found = time_stages([stage(clock, 1.0), stage(clock, 3.0, 3.0, 9.0)], CPU, policy(target=1e-9, cap_s=1.0))
    assert set(found.samples_ms) == {4.0, 10.0}
    assert found.stage_ms == (1.0, 3.0)
    assert found.time_ms == np.median(found.samples_ms) == 4.0


def test_prepare_runs_before_each_sample_and_is_not_timed(clock):
    calls = []
    stages = [stage(clock, 1.0, calls=calls, name="forward"), stage(clock, 2.0, calls=calls, name="backward")]
    prepare = stage(clock, 50.0, calls=calls, name="prepare")
    found = time_stages(stages, CPU, policy(cap_s=100.0), prepare)
    assert calls == ["prepare", "forward", "backward"] * len(found.samples_ms)
    assert set(found.samples_ms) == {3.0}
    assert found.stage_ms == (1.0, 2.0)


def test_keep_runs_after_each_sample_and_neither_its_time_nor_the_cap_includes_it(clock, monkeypatch):
    monkeypatch.setattr(timing, "OUT_OF_REACH", math.inf)
    calls = []
    stages = [stage(clock, 1.0, 2.0, calls=calls, name="forward")]
    keep = stage(clock, 500.0, calls=calls, name="keep")
    found = time_stages(stages, CPU, policy(target=1e-9, cap_s=0.06), keep=keep)
    assert calls == ["forward", "keep"] * len(found.samples_ms)
    assert set(found.samples_ms) == {1.0, 2.0}
    assert 40 <= len(found.samples_ms) <= 42, "60 ms of samples"


def noise(share, count=5000):
    return np.random.default_rng(3).normal(10.0, 10.0 * share, size=count).tolist()


def test_the_time_cap_ends_what_does_not_converge(clock):
    """The run would reach the target soon after the cap. It keeps every sample that it took."""
    calls = []
    found = time_stages([stage(clock, *noise(0.1), calls=calls)], CPU, policy(target=0.02, cap_s=1.0))
    assert not found.converged
    assert len(found.samples_ms) == len(calls)
    assert 1.0 <= sum(found.samples_ms) / 1e3 < 1.0 + BATCH * 0.014
    assert found.time_ms_low < found.time_ms < found.time_ms_high


def test_a_target_out_of_reach_costs_a_quarter_of_the_cap(clock):
    found = time_stages([stage(clock, *noise(0.1))], CPU, policy(target=0.001, cap_s=4.0))
    assert not found.converged
    assert 1.0 <= sum(found.samples_ms) / 1e3 < 1.0 + BATCH * 0.014


def test_the_time_cap_counts_what_prepare_takes(clock, monkeypatch):
    monkeypatch.setattr(timing, "OUT_OF_REACH", math.inf)
    calls = []
    prepare = stage(clock, 100.0)
    time_stages([stage(clock, 1.0, 2.0, calls=calls)], CPU, policy(target=1e-9, cap_s=1.0), prepare)
    assert len(calls) == 10


@pytest.mark.parametrize("target", [0.0, 0.02])
def test_a_call_longer_than_the_time_cap_is_sampled_often_enough_for_an_interval(clock, target):
    found = time_stages([stage(clock, 4000.0, 4000.1)], CPU, policy(target=target, cap_s=1.0))
    assert len(found.samples_ms) == MIN_SAMPLES
    assert math.isfinite(found.time_ms_low)
    assert math.isfinite(found.time_ms_high)
    assert found.converged == (target > 0)


def test_sampling_goes_on_until_the_interval_is_within_the_target(clock):
    durations = np.random.default_rng(3).normal(10.0, 1.0, size=5000).tolist()
    found = time_stages([stage(clock, *durations)], CPU, policy(target=0.01, cap_s=1e4))
    count = len(found.samples_ms)
    assert found.converged
    assert CONVERGED_SAMPLES + BATCH < count < 5000
    assert relative_half_width(found.time_ms, found.time_ms_low, found.time_ms_high) <= 0.01
    before = found.samples_ms[: count - BATCH]
    assert relative_half_width(*series_interval(before)) > 0.01
    assert found.samples_ms == pytest.approx(durations[:count], abs=1e-6)


def test_the_defaults_are_those_of_the_contract():
    assert TimingPolicy.default(CPU).interval_target == 0.02
    assert TimingPolicy.default(torch.device("cuda", 0)).interval_target == 0.005


def test_on_the_real_clock_every_sample_takes_time():
    a = torch.rand(64, 64)
    found = time_stages([lambda: a @ a, lambda: a + a], CPU, policy(target=1e9, cap_s=0.0))
    assert min(found.samples_ms) > 0
    assert 0 < found.time_ms_low <= found.time_ms <= found.time_ms_high
    assert len(found.stage_ms) == 2


class ScriptedSampler:
    """Samples of a GPU with a clock that a test sets: groups of (clock, slowed down, milliseconds)."""

    flags = ("synchronises",)

    def __init__(self, *groups):
        self._groups = itertools.cycle(groups)

    def sample(self, count):
        mhz, slowed_down, ms = next(self._groups)
        return Group([(ms,)] * count, [], Clock(sm_clock_mhz=mhz, slowed_down=slowed_down))

    def host_time_ms(self):
        return 5.0


def of_groups(*groups):
    """Return the statistics of these groups; the first has MIN_SAMPLES samples, each later one BATCH."""
    sampler = ScriptedSampler(*groups)
    counts = (MIN_SAMPLES, *[BATCH] * (len(groups) - 1))
    return timing._statistics([sampler.sample(count) for count in counts], True, 5.0, sampler.flags, ALONE)


def test_samples_of_another_clock_are_kept_and_marked_and_do_not_count():
    found = of_groups((1980, (), 1.0), (1400, (), 2.0), (1980, (), 1.0))
    assert (found.time_ms, found.sm_clock_mhz) == (1.0, 1980)
    assert found.samples_ms == (1.0,) * MIN_SAMPLES + (2.0,) * BATCH + (1.0,) * BATCH
    assert found.marked == (False,) * MIN_SAMPLES + (True,) * BATCH + (False,) * BATCH
    assert found.flags == ("synchronises", "clock_changed")


def test_samples_of_a_gpu_that_was_slowed_down_do_not_count_where_there_are_others():
    found = of_groups((1980, (), 1.0), (1980, ("hw_slowdown",), 2.0))
    assert (found.time_ms, found.flags) == (1.0, ("synchronises", "clock_changed", "slowed_down"))
    throughout = of_groups((1980, ("hw_slowdown",), 2.0), (1980, ("hw_slowdown",), 2.0))
    assert (throughout.time_ms, throughout.flags) == (2.0, ("synchronises", "slowed_down"))
    assert not any(throughout.marked)


def test_clocks_that_waver_little_or_are_not_known_are_one_regime():
    assert of_groups((1980, (), 1.0), (1965, (), 1.0), (None, (), 1.0)).flags == ("synchronises",)
    unknown = of_groups((None, (), 1.0), (None, (), 3.0))
    assert (unknown.sm_clock_mhz, any(unknown.marked)) == (None, False)


def test_the_collector_of_garbage_rests_while_samples_are_taken():
    enabled = []
    time_stages([lambda: enabled.append(gc.isenabled())], CPU, policy(target=1e9, cap_s=0.0))
    assert not any(enabled)
    assert gc.isenabled()


def test_a_sample_is_its_slowest_ranks_with_that_ranks_stages(monkeypatch):
    mine = Group([(1.0, 3.0), (5.0, 1.0)], [], Clock(sm_clock_mhz=1980))
    others = Group([(4.0, 4.5), (0.5, 1.0)], [], Clock(sm_clock_mhz=1965))
    sampler = SimpleNamespace(flags=(), sample=lambda count: mine, host_time_ms=lambda: 7.0)
    monkeypatch.setattr(samplers, "_CpuSampler", lambda *arguments: sampler)
    policy = TimingPolicy(interval_target=0.9, time_cap_s=1e-9)
    # the other rank tells, in turn: its samples, the time it spent, its host time
    found = timing.time_stages([], CPU, policy, ranks=Two(others, 0.0, 9.0))
    assert found.samples_ms == (8.5, 6.0)
    assert found.stage_ms == (4.5, 2.75)
    assert found.skew_ms == pytest.approx((4.5 + 4.5) / 2)
    assert (found.time_ms, found.host_time_ms, found.sm_clock_mhz) == (7.25, 9.0, 1965)


def test_ranks_agree_on_when_to_stop(monkeypatch):
    """All ranks use the clock that is furthest. Otherwise one rank samples on and waits for the others for ever."""
    counts = []

    def sample(count):
        counts.append(count)
        return Group([(1.0,)] * count, [], Clock())

    sampler = SimpleNamespace(flags=(), sample=sample, host_time_ms=float)
    monkeypatch.setattr(samplers, "_CpuSampler", lambda *arguments: sampler)
    policy = TimingPolicy(interval_target=1e-12, time_cap_s=1e6)
    ranks = Two(Group([(1.0,)] * timing.MIN_SAMPLES, [], Clock()), 2e6)
    found = timing.time_stages([], CPU, policy, ranks=ranks)
    assert len(counts) == 1
    assert len(found.samples_ms) == timing.MIN_SAMPLES


class Driver:
    """A CUDA driver that says how many bytes of L2 are set aside, and counts what it is asked to do."""

    def __init__(self, num_bytes, status=0):
        self.num_bytes, self.status, self.num_resets = num_bytes, status, 0

    def cuCtxGetLimit(self, found, limit):
        assert limit == 6, "CU_LIMIT_PERSISTING_L2_CACHE_SIZE"
        found._obj.value = self.num_bytes
        return self.status

    def cuCtxResetPersistingL2Cache(self):
        self.num_resets += 1
        return 0


def test_what_the_driver_sets_aside_is_read_and_reset(monkeypatch):
    driver = Driver(4096)
    monkeypatch.setattr(samplers.ctypes, "CDLL", lambda name: driver)
    persisting = samplers.PersistingL2()
    assert persisting.set_aside_bytes() == 4096
    persisting.reset()
    assert driver.num_resets == 1
    driver.status = 201  # CUDA_ERROR_INVALID_CONTEXT
    assert persisting.set_aside_bytes() == 0


@pytest.mark.parametrize("library", [None, SimpleNamespace()])
def test_without_a_driver_that_knows_it_nothing_is_set_aside(monkeypatch, library):
    def load(name):
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(samplers.ctypes, "CDLL", load)
    persisting = samplers.PersistingL2()
    assert persisting.set_aside_bytes() == 0
    persisting.reset()
