"""Gates simulated from recorded samples: how often they alarm falsely, and what they find. No torch here.

    python -m moebench.simulate RESULTS [--num-gates N] [--between SHARE]

prints a table of docs/gating.md. A simulated gate draws jobs from a result, with replacement, and for both
sides of each the rounds that it might have had:

* of a job with several recorded rounds, rounds drawn from those, with replacement, each moved by a little of their own
  spread (a smoothed bootstrap), so that two drawn alike are not the same to the last bit;
* of a job with one recorded process, the median of its samples, drawn in blocks so that neighbours stay neighbours,
  times a factor between processes, log-normal of the share `between`: that part is assumed, not recorded.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moebench.findings import is_ok, rounds_of
from moebench.frame import load
from moebench.verdicts import FALSE_ALARMS, POWER, THRESHOLD, Sides, TimeVerdict, Verdict, judge_times

#: Fewer recorded rounds than this say too little of how rounds are spread.
MIN_RECORDED = 5
ASSUMED_BETWEEN = (0.003, 0.01)
NUM_JOBS = 200
ROUNDS = ((10, 10), (20, 20), (20, 5))
#: From 0.5% up, each a tenth more than the one before.
EFFECTS = tuple(0.005 * 1.1**step for step in range(70))

_FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """The noise of one job: recorded rounds, or samples of one process and what is assumed between processes."""

    backend: str
    log_rounds: _FloatArray
    log_samples: _FloatArray
    between: float

    @property
    def is_recorded(self) -> bool:
        """Whether the noise between processes is recorded rather than assumed."""
        return len(self.log_rounds) >= MIN_RECORDED

    def draw(self, random: np.random.Generator, num_rounds: int) -> _FloatArray:
        """Logarithms of the medians of so many rounds, around 0."""
        if self.is_recorded:
            picked = random.choice(self.log_rounds, num_rounds)
            bandwidth = 0.9 * _spread(self.log_rounds) * len(self.log_rounds) ** -0.2  # Silverman's rule
            return np.asarray(picked + random.normal(0, bandwidth, num_rounds))
        return np.asarray(self._medians(random, num_rounds) + random.normal(0, self.between, num_rounds))

    def _medians(self, random: np.random.Generator, num_rounds: int) -> _FloatArray:
        """Medians of as many samples as were recorded, in circular blocks of their number's square root."""
        size = len(self.log_samples)
        block = max(1, round(math.sqrt(size)))
        starts = random.integers(0, size, (num_rounds, -(-size // block)))
        picked = (starts[:, :, None] + np.arange(block)).reshape(num_rounds, -1)[:, :size] % size
        return np.asarray(np.median(self.log_samples[picked], axis=1))


def _spread(values: _FloatArray) -> float:
    """The standard deviation or, where outliers make that larger, the quartiles' distance on its scale."""
    low, high = np.percentile(values, (25, 75))
    return float(min(np.std(values, ddof=1), (high - low) / 1.349))


def noises(frame: pd.DataFrame, between: float) -> list[Noise]:
    """The noise of every job of a result that has a time; `between` where one process was recorded."""
    rows = [row for row in frame.to_dict("records") if is_ok(row)]
    return [
        Noise(row["backend"], _centred(rounds_of(row)), _centred(row["samples_ms"]), between)
        for row in rows
        if len(rounds_of(row)) >= 1
    ]


def _centred(times_ms: Sequence[float]) -> _FloatArray:
    logs = np.log(np.asarray(times_ms, float))
    return np.asarray(logs - np.median(logs))


@dataclass(frozen=True)
class Setting:
    """What is simulated: rounds of both sides, and jobs a gate.

    `session`: the standard deviation of a shift, as a share, that each job of each side has in all its rounds, as on
    two days on one machine; no test within a result can see it.
    """

    rounds: tuple[int, int]
    num_jobs: int = NUM_JOBS
    session: float = 0.0
    threshold: float = THRESHOLD
    false_alarms: float = FALSE_ALARMS


@dataclass(frozen=True)
class Rate:
    """So many of so many."""

    count: int
    total: int

    @property
    def share(self) -> float:
        return self.count / self.total if self.total else math.nan

    def __str__(self) -> str:
        return f"{self.share:.1%} ({self.count} of {self.total})" if self.total else "-"


def drawn(recorded: Sequence[Noise], setting: Setting, random: np.random.Generator) -> tuple[Noise, Sides]:
    """A job in which nothing changed, and the rounds of both its sides."""
    job = recorded[int(random.integers(len(recorded)))]
    first, second = (
        tuple(np.exp(job.draw(random, size) + random.normal(0, setting.session)).tolist()) for size in setting.rounds
    )
    return job, Sides(first, second)


def false_alarms(recorded: Sequence[Noise], setting: Setting, num_gates: int, seed: int = 0) -> Rate:
    """Of gates in which nothing changed, those that call any job REGRESSED."""
    random = np.random.default_rng(seed)
    alarms = 0
    for _ in range(num_gates):
        family = {number: drawn(recorded, setting, random)[1] for number in range(setting.num_jobs)}
        found = judge_times(family, setting.threshold, setting.false_alarms).values()
        alarms += any(some.verdict is Verdict.REGRESSED for some in found)
    return Rate(alarms, num_gates)


@dataclass(frozen=True)
class Planted:
    """A job before and after it was slowed down by `effect`: what a gate says of it, the only one that changed."""

    backend: str
    effect: float
    without: TimeVerdict
    slowed: TimeVerdict

    @property
    def is_found(self) -> bool:
        return self.slowed.verdict is Verdict.REGRESSED


def plant(
    recorded: Sequence[Noise], setting: Setting, effects: Sequence[float], num_gates: int, seed: int = 0
) -> list[Planted]:
    """Slow one job of each gate down by each of the `effects`.

    Of a family in which nothing else changed, Holm's correction leaves the one slowed job the level of Bonferroni's.
    """
    random = np.random.default_rng(seed)
    level = setting.false_alarms / setting.num_jobs

    def judged(sides: Sides) -> TimeVerdict:
        return judge_times({0: sides}, setting.threshold, level)[0]

    found = []
    for _ in range(num_gates):
        job, sides = drawn(recorded, setting, random)
        without = judged(sides)
        for effect in effects:
            slow = tuple(time * (1 + effect) for time in sides.candidate_ms)
            found.append(Planted(job.backend, effect, without, judged(Sides(sides.baseline_ms, slow))))
    return found


def rate(found: Sequence[Planted]) -> Rate:
    """Of slowed jobs, those that were found."""
    return Rate(sum(some.is_found for some in found), len(found))


def seen(found: Sequence[Planted], threshold: float = THRESHOLD) -> list[Planted]:
    """Those of which the gate said, before anything was slowed, that it would have seen the threshold."""
    return [some for some in found if some.without.smallest_effect <= threshold]


def smallest_found(recorded: Sequence[Noise], setting: Setting, num_gates: int, seed: int = 0) -> float:
    """The smallest of EFFECTS that is found in 95% of gates, whatever job it is planted in; inf where none is.

    Whatever the setting's threshold: an effect below it, which the gate lets pass, is found if it is shown.
    """
    found = plant(recorded, replace(setting, threshold=0.0), EFFECTS, num_gates, seed)
    enough = [effect for effect in EFFECTS if rate([some for some in found if some.effect == effect]).share >= POWER]
    return min(enough, default=math.inf)


# The table of docs/gating.md

HEADER = (
    *("rounds", "between processes", "false alarms", "slower by 3% found, of jobs that say they can see it"),
    *("jobs that can", "found in any job 95 times of 100"),
)


def table(frame: pd.DataFrame, between: Sequence[float], num_gates: int, num_jobs: int) -> Iterator[str]:
    """The figures of one result as Markdown, a row for each setting and, where it is not recorded, assumption."""
    yield "| " + " | ".join(HEADER) + " |"
    yield "| --- " * len(HEADER) + "|"
    for assumed in between:
        recorded = noises(frame, assumed)
        is_recorded = all(noise.is_recorded for noise in recorded)
        for rounds in ROUNDS:
            setting = Setting(rounds, num_jobs)
            found = plant(recorded, setting, [THRESHOLD], 4 * num_gates)
            cells = (
                *(f"{rounds[0]} and {rounds[1]}", "recorded" if is_recorded else f"{assumed:.1%}, assumed"),
                *(false_alarms(recorded, setting, num_gates), rate(seen(found))),
                *(Rate(len(seen(found)), len(found)), f"{smallest_found(recorded, setting, num_gates):.1%}"),
            )
            yield "| " + " | ".join(map(str, cells)) + " |"
        if is_recorded:
            return


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; `arguments` instead of the command line's."""
    parser = argparse.ArgumentParser(description="What the gate does, simulated from recorded samples.")
    parser.add_argument("results", type=Path, help="results folder or Parquet file")
    parser.add_argument("--num-gates", type=int, default=500, help="simulated gates")
    parser.add_argument("--num-jobs", type=int, default=NUM_JOBS, help="jobs a gate")
    parser.add_argument("--between", type=float, nargs="*", default=ASSUMED_BETWEEN, help="share, where not recorded")
    parser.add_argument("--backend", nargs="*", help="jobs of these backends alone")
    asked = parser.parse_args(arguments)
    frame = load(asked.results)
    if asked.backend:
        frame = frame[frame["backend"].isin(asked.backend)]
    for line in table(frame, asked.between, asked.num_gates, asked.num_jobs):
        print(line, flush=True)


if __name__ == "__main__":
    main()
