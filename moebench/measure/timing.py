"""Time a callable, and compute statistics of its times. This module knows no backend.

Samples are taken in groups, and a GPU's clock is read around each group. Some groups run at another clock than most, or
while the GPU is slowed down. These groups are kept and marked, but the statistics leave them out.
"""

import gc
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import scipy.special  # noqa: F401  results.stats imports it on first use, which must not be while something is timed
import torch

from moebench.measure import clock
from moebench.measure.samplers import Group, Sampler, Stage, make_sampler, slower
from moebench.results.stats import MIN_SAMPLES, relative_half_width, series_interval
from moebench.workload.ranks import ALONE, Ranks

BATCH = 20
#: Sampling that is precise enough does not stop before this many samples, because a few may agree by chance.
CONVERGED_SAMPLES = 20
#: If, after a quarter of the time cap, the target precision would take more than this many time caps, sampling stops.
OUT_OF_REACH = 2.0
#: A group belongs to another clock regime if its clock differs by more than this fraction from the usual clock.
REGIME_CLOCK_TOLERANCE = 0.02


@dataclass(frozen=True)
class TimingPolicy:
    """When sampling stops.

    Sampling stops when half the width of the median's 95% confidence interval is at most `interval_target` times the
    median, or when `time_cap_s` seconds are spent. The interval narrows with the square root of time. If this is too
    slow to reach the target, sampling stops after a quarter of `time_cap_s`. Before the time cap, sampling does not
    stop with fewer than `least_samples` samples.
    """

    interval_target: float
    time_cap_s: float
    cold_l2: bool = True
    least_samples: int = CONVERGED_SAMPLES

    def sampling_each(self, steps: Sequence[object]) -> "TimingPolicy":
        """Return the policy with at least one sample for each of these steps, unless the time cap is spent before."""
        return replace(self, least_samples=max(self.least_samples, len(steps)))

    @staticmethod
    def default(device: torch.device) -> "TimingPolicy":
        on_gpu = device.type == "cuda"
        return TimingPolicy(interval_target=0.005 if on_gpu else 0.02, time_cap_s=2.0 if on_gpu else 1.0)


@dataclass(frozen=True)
class Timing:
    """Statistics of one call. `samples_ms` has the times of whole calls, and `stage_ms` the median of each stage.

    With several ranks, each sample is the time of the slowest rank. `skew_ms` is the median difference between the
    slowest and the fastest rank; it is None for a single rank. `marked` says for each sample whether it belongs to
    another clock regime than most. The statistics and `sm_clock_mhz` come only from samples that are not marked, or
    from all if all are marked.
    """

    samples_ms: tuple[float, ...]
    marked: tuple[bool, ...]
    stage_ms: tuple[float, ...]
    time_ms: float
    time_ms_low: float
    time_ms_high: float
    converged: bool
    host_time_ms: float
    skew_ms: float | None
    sm_clock_mhz: int | None
    flags: tuple[str, ...]

    @property
    def hidden_ms(self) -> float:
        """How long a GPU must be busy so that the host can hand over the call meanwhile; 0 if the call waits for it."""
        return 0.0 if "synchronises" in self.flags else 1.5 * self.host_time_ms


def time_stages(
    stages: Sequence[Stage],
    device: torch.device,
    policy: TimingPolicy,
    prepare: Stage = lambda: None,
    ranks: Ranks = ALONE,
    keep: Stage = lambda: None,
) -> Timing:
    """Sample the stages, which must be warm, until the policy stops.

    `prepare` runs before each sample and `keep` after it, both untimed. The time cap includes the seconds of `prepare`,
    but not those of `keep`. Ranks start every sample together. The time of a sample is the time of its slowest rank.
    """
    aside = _Aside(keep)
    with no_garbage_collection(), make_sampler(stages, device, policy.cold_l2, prepare, aside, ranks) as sampler:
        groups, converged = _sample(sampler, policy, ranks, aside)
        return _statistics(groups, converged, ranks.largest(sampler.host_time_ms()), sampler.flags, ranks)


class _Aside:
    """A stage whose seconds are added up, so that the time cap can leave them out."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.spent_s = 0.0

    def __call__(self) -> None:
        started = clock.perf_counter()
        self._stage()
        self.spent_s += clock.perf_counter() - started


def _sample(sampler: Sampler, policy: TimingPolicy, ranks: Ranks, aside: _Aside) -> tuple[list[Group], bool]:
    groups: list[Group] = []
    start, count, num_samples = clock.perf_counter() - aside.spent_s, MIN_SAMPLES, 0
    while True:
        groups.append(_slowest(ranks.tell(sampler.sample(count))))
        num_samples += count
        median, low, high = series_interval([ms for group in _of_one_regime(groups) for ms in group.totals_ms])
        width = relative_half_width(median, low, high)
        # all ranks use one clock, so that they stop together
        spent = ranks.largest(clock.perf_counter() - start - aside.spent_s)
        if width <= policy.interval_target and (num_samples >= policy.least_samples or spent >= policy.time_cap_s):
            return groups, True
        out_of_reach = spent * width**2 > OUT_OF_REACH * policy.time_cap_s * policy.interval_target**2
        hopeless = out_of_reach and num_samples >= policy.least_samples and spent >= policy.time_cap_s / 4
        if spent >= policy.time_cap_s or hopeless:
            return groups, False
        affordable = int((policy.time_cap_s - spent) / (spent / num_samples))
        count = max(1, min(BATCH, affordable))


def _slowest(ranks: Sequence[Group]) -> Group:
    """Merge the groups of all ranks: take the slowest rank's time of each sample, and the slowest clock."""
    samples, skews_ms = [], []
    for sample in zip(*(rank.samples for rank in ranks), strict=True):
        totals_ms = [sum(stage_ms) for stage_ms in sample]
        samples.append(sample[totals_ms.index(max(totals_ms))])
        skews_ms.append(max(totals_ms) - min(totals_ms))
    return Group(samples, skews_ms, slower([rank.clock for rank in ranks]))


def _of_one_regime(groups: Sequence[Group]) -> list[Group]:
    """Return the groups that ran at the usual clock and were not slowed down; all groups if there are none."""
    clocks = [group.clock.sm_clock_mhz for group in groups for _ in group.samples]
    known = [clock for clock in clocks if clock is not None]
    usual = statistics.median_low(known) if known else None

    def is_usual(group: Group) -> bool:
        clock = group.clock.sm_clock_mhz
        near = usual is None or clock is None or abs(clock - usual) <= REGIME_CLOCK_TOLERANCE * usual
        return near and not group.clock.slowed_down

    return [group for group in groups if is_usual(group)] or list(groups)


def _statistics(
    groups: Sequence[Group], converged: bool, host_time_ms: float, flags: tuple[str, ...], ranks: Ranks
) -> Timing:
    usual = _of_one_regime(groups)
    samples = [sample for group in usual for sample in group.samples]
    median, low, high = series_interval([sum(sample) for sample in samples])
    slowed_down = any(group.clock.slowed_down for group in groups)
    flags += ("clock_changed",) * (len(usual) < len(groups)) + ("slowed_down",) * slowed_down
    clocks = [group.clock.sm_clock_mhz for group in usual if group.clock.sm_clock_mhz is not None]
    return Timing(
        samples_ms=tuple(total for group in groups for total in group.totals_ms),
        marked=tuple(group not in usual for group in groups for _ in group.samples),
        stage_ms=tuple(statistics.median(stage) for stage in zip(*samples, strict=True)),
        time_ms=median,
        time_ms_low=low,
        time_ms_high=high,
        converged=converged,
        host_time_ms=host_time_ms,
        skew_ms=statistics.median(ms for group in usual for ms in group.skews_ms) if ranks.size > 1 else None,
        sm_clock_mhz=statistics.median_low(clocks) if clocks else None,
        flags=flags,
    )


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Switch Python's garbage collector off: it may run at any time, and it takes milliseconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
