"""Gates simulated from recorded samples: how often they alarm falsely, and what they find. No torch here.

    python -m moebench.verdicts.simulate RESULTS [--num-gates N] [--num-jobs N] [--threshold SHARE]
        [--between SHARE] [--ab]

prints a table of docs/gating.md. A simulated gate draws jobs from a result, with replacement, and for both
sides of each the rounds that it might have had (moebench.verdicts.noise):

* of a job with several recorded rounds, rounds drawn from those, with replacement, each moved by a little of their own
  spread (a smoothed bootstrap), so that two drawn alike are not the same to the last bit;
* of a job with one recorded process, the median of its samples, drawn in blocks so that neighbours stay neighbours,
  times a factor between processes, log-normal of the share `between`: that part is assumed, not recorded;
* with `--ab`, of a folder that `moebench ab` wrote for twice the same revision, rounds as a whole: what their processes
  had in common they have in common again. Each look of `ab` is simulated alone, at its share of the false alarms.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from moebench.errors import ResultsError
from moebench.results.frame import load
from moebench.results.stats import THRESHOLD
from moebench.verdicts.looks import LOOK_FALSE_ALARMS, RUNS_A_SIDE, schedule
from moebench.verdicts.noise import JobNoise, noises, noises_together
from moebench.verdicts.times import FALSE_ALARMS, POWER, Sides, TimeVerdict, judge_times
from moebench.verdicts.verdict import Verdict

ASSUMED_BETWEEN = (0.003, 0.01)
NUM_JOBS = 200
ROUNDS = ((10, 10), (20, 20), (20, 5))
#: From 0.5% up, each a tenth more than the one before.
EFFECTS = tuple(0.005 * 1.1**step for step in range(70))


@dataclass(frozen=True)
class Setting:
    """What is simulated: rounds of both sides, and jobs a gate.

    `session`: the standard deviation of a shift, as a share, that each job of each side has in all its rounds, as on
    two days on one machine; no test within a result can see it.
    """

    rounds: tuple[int, int] = ROUNDS[0]
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


def _drawn(recorded: Sequence[JobNoise], setting: Setting, random: np.random.Generator) -> tuple[JobNoise, Sides]:
    """A job in which nothing changed, and the rounds of both its sides."""
    job = recorded[int(random.integers(len(recorded)))]
    return job, job.sides(random, setting.rounds, setting.session)


def false_alarms(recorded: Sequence[JobNoise], setting: Setting, num_gates: int, seed: int = 0) -> Rate:
    """Of gates in which nothing changed, those that call any job REGRESSED."""
    random = np.random.default_rng(seed)
    alarms = 0
    for _ in range(num_gates):
        family = {number: _drawn(recorded, setting, random)[1] for number in range(setting.num_jobs)}
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
    recorded: Sequence[JobNoise], setting: Setting, effects: Sequence[float], num_gates: int, seed: int = 0
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
        job, sides = _drawn(recorded, setting, random)
        without = judged(sides)
        for effect in effects:
            slow = tuple(time * (1 + effect) for time in sides.candidate_ms)
            found.append(Planted(job.backend, effect, without, judged(replace(sides, candidate_ms=slow))))
    return found


def detection_rate(found: Sequence[Planted]) -> Rate:
    """Of slowed jobs, those that were found."""
    return Rate(sum(some.is_found for some in found), len(found))


def seen(found: Sequence[Planted], threshold: float = THRESHOLD) -> list[Planted]:
    """Those of which the gate said, before anything was slowed, that it would have seen the threshold."""
    return [some for some in found if some.without.smallest_effect <= threshold]


def smallest_found(recorded: Sequence[JobNoise], setting: Setting, num_gates: int, seed: int = 0) -> float:
    """The smallest of EFFECTS that is found in 95% of gates, whatever job it is planted in; inf where none is.

    Whatever the setting's threshold: an effect below it, which the gate lets pass, is found if it is shown.
    """
    found = plant(recorded, replace(setting, threshold=0.0), EFFECTS, num_gates, seed)
    enough = [
        effect for effect in EFFECTS if detection_rate([some for some in found if some.effect == effect]).share >= POWER
    ]
    return min(enough, default=math.inf)


# The table of docs/gating.md

HEADER = (
    *("rounds", "between processes", "false alarms", "slower by the threshold found, of jobs that say they can see it"),
    *("jobs that can", "found in any job 95 times of 100"),
)


def table(recorded: Sequence[JobNoise], settings: Sequence[Setting], between: str, num_gates: int) -> Iterator[str]:
    """The figures as Markdown, a row for each setting; `between` says what processes differ by."""
    for setting in settings:
        found = plant(recorded, setting, [setting.threshold], 4 * num_gates)
        visible = seen(found, setting.threshold)
        cells = (
            *(f"{setting.rounds[0]} and {setting.rounds[1]}", between),
            *(false_alarms(recorded, setting, num_gates), detection_rate(visible), Rate(len(visible), len(found))),
            f"{smallest_found(recorded, setting, num_gates):.1%}",
        )
        yield "| " + " | ".join(map(str, cells)) + " |"


def of_results(frame: pd.DataFrame, between: Sequence[float], num_gates: int, setting: Setting) -> Iterator[str]:
    """The table of a gate on stored results; for each assumption where processes' noise is not recorded."""
    settings = [replace(setting, rounds=rounds) for rounds in ROUNDS]
    for assumed in between:
        recorded = noises(frame, assumed)
        if all(noise.is_recorded for noise in recorded):
            yield from table(recorded, settings, "recorded", num_gates)
            return
        yield from table(recorded, settings, f"{assumed:.1%}, assumed", num_gates)


def of_ab(a: pd.DataFrame, b: pd.DataFrame, num_gates: int, setting: Setting) -> Iterator[str]:
    """The table of `moebench ab`, a row a look."""
    rounds = [(RUNS_A_SIDE * look, RUNS_A_SIDE * look) for look in schedule(setting.num_jobs)]
    settings = [replace(setting, rounds=some, false_alarms=LOOK_FALSE_ALARMS) for some in rounds]
    yield from table(noises_together(a, b), settings, "recorded", num_gates)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; `arguments` instead of the command line's."""
    parser = argparse.ArgumentParser(description="What the gate does, simulated from recorded samples.")
    parser.add_argument("results", type=Path, help="results folder or Parquet file")
    parser.add_argument("--num-gates", type=int, default=500, help="simulated gates")
    parser.add_argument("--num-jobs", type=int, default=NUM_JOBS, help="jobs a gate")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="the gate's, as a share")
    parser.add_argument("--between", type=float, nargs="*", default=ASSUMED_BETWEEN, help="share, where not recorded")
    parser.add_argument("--backend", nargs="*", help="jobs of these backends alone")
    parser.add_argument("--ab", action="store_true", help="results of `moebench ab` for twice the same revision")
    asked = parser.parse_args(arguments)

    def opened(folder: Path) -> pd.DataFrame:
        try:
            frame = load(folder)
        except ResultsError as error:
            parser.error(str(error))
        return frame[frame["backend"].isin(asked.backend)] if asked.backend else frame

    setting = Setting(num_jobs=asked.num_jobs, threshold=asked.threshold)
    if asked.ab:
        lines = of_ab(opened(asked.results / "a"), opened(asked.results / "b"), asked.num_gates, setting)
    else:
        lines = of_results(opened(asked.results), asked.between, asked.num_gates, setting)
    print("| " + " | ".join(HEADER) + " |")
    print("| --- " * len(HEADER) + "|")
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
