"""Simulate gates from recorded samples: how often they raise a false alarm, and which slowdowns they find.

    python -m moebench.verdicts.simulate RESULTS [--num-gates N] [--num-jobs N] [--threshold SHARE]
        [--between SHARE] [--ab]

The command prints a table of docs/gating.md. A simulated gate draws jobs from a result, with replacement. For both
sides of each job, the simulation draws random rounds (moebench.verdicts.noise) in one of three ways:

* If the job has at least `MIN_RECORDED` recorded rounds, the simulation draws from the recorded rounds with
  replacement. It moves each drawn round by a small part of the rounds' spread (a smoothed bootstrap), so that two draws
  of one round are not equal to the last bit.
* If the job has fewer recorded rounds, the simulation draws the job's samples in blocks, so that neighbours stay
  together, and takes the median of the drawn samples. It multiplies the median by a log-normal random factor, which
  stands for the difference between processes. The spread of the factor, `between`, is assumed and not recorded.
* With `--ab`, RESULTS is a folder of `moebench ab` for the same revision twice. The simulation draws whole rounds, so
  that a disturbance that hit all processes of a round still hits all of them. It simulates each look of `ab` on its
  own, with the look's share of the false alarms.
"""

import argparse
import math
from bisect import bisect_left
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
from moebench.verdicts.ranksum import null_tail
from moebench.verdicts.times import FALSE_ALARMS, POWER, Sides, TimeVerdict, judge_times
from moebench.verdicts.verdict import Verdict

ASSUMED_BETWEEN = (0.003, 0.01)
NUM_JOBS = 200
ROUNDS = ((10, 10), (20, 20), (20, 5))
#: Slowdowns from 0.5% up, as shares. Each slowdown is a tenth larger than the slowdown before it.
EFFECTS = tuple(0.005 * 1.1**step for step in range(70))


@dataclass(frozen=True)
class Setting:
    """The setting of a simulation.

    `rounds`: the numbers of rounds of the baseline and of the candidate. `num_jobs`: the number of jobs per gate.
    `session`: the standard deviation, as a share, of a random shift that all rounds of one job and side have in common.
    It stands for the difference between two days on one machine, which no test within one result can see.
    `threshold`, `false_alarms`: the settings of the gate.
    """

    rounds: tuple[int, int] = ROUNDS[0]
    num_jobs: int = NUM_JOBS
    session: float = 0.0
    threshold: float = THRESHOLD
    false_alarms: float = FALSE_ALARMS


@dataclass(frozen=True)
class Rate:
    """The number of cases in which something happened, and the number of all cases."""

    count: int
    total: int

    @property
    def share(self) -> float:
        return self.count / self.total if self.total else math.nan

    def __str__(self) -> str:
        return f"{self.share:.1%} ({self.count} of {self.total})" if self.total else "-"


def _drawn(recorded: Sequence[JobNoise], setting: Setting, random: np.random.Generator) -> tuple[JobNoise, Sides]:
    """Draw a job in which nothing changed, and rounds of both sides."""
    job = recorded[int(random.integers(len(recorded)))]
    return job, job.sides(random, setting.rounds, setting.session)


def false_alarms(recorded: Sequence[JobNoise], setting: Setting, num_gates: int, seed: int = 0) -> Rate:
    """Simulate gates in which nothing changed, and count the gates that give any job the verdict REGRESSED."""
    random = np.random.default_rng(seed)
    families = ([_drawn(recorded, setting, random)[1] for _ in range(setting.num_jobs)] for _ in range(num_gates))
    return Rate(sum(alarms(family, setting.threshold, setting.false_alarms) for family in families), num_gates)


def alarms(family: Sequence[Sides], threshold: float, false_alarms: float) -> bool:
    """Return whether a gate gives any job of a family the verdict REGRESSED.

    To save time, the gate judges the family only if the rank-sum test alone shows a slowdown of some job. If it shows
    none, neither does the gate: all other evidence only makes p-values larger.
    """
    if min(_p_greater(family)) > false_alarms / len(family):
        return False
    found = judge_times(dict(enumerate(family)), threshold, false_alarms).values()
    return any(some.verdict is Verdict.REGRESSED for some in found)


def _p_greater(family: Sequence[Sides]) -> Sequence[float]:
    """Return the p-value of "not slower" of each job, from the rank-sum test alone."""
    if any(sides.blocks for sides in family) or len({sides.rounds for sides in family}) > 1:
        return [sides.shifts.p_greater for sides in family]
    one, two = (np.array([getattr(sides, side) for sides in family]) for side in ("baseline_ms", "candidate_ms"))
    not_slower = np.count_nonzero(two[:, :, None] <= one[:, None, :], axis=(1, 2))
    return [float(some) for some in null_tail([family[0].rounds])[not_slower]]


@dataclass(frozen=True)
class Planted:
    """The verdicts on a job without a slowdown and with a slowdown by `effect`. No other job of the gate changed."""

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
    """Slow one job of each gate down by each of the `effects`, and return the verdicts on the slowed job.

    The other jobs of the gate are not simulated. The slowed job is tested at the level of Bonferroni's correction,
    because Holm's correction gives the job the same level if nothing else in the family changed.
    """
    random = np.random.default_rng(seed)
    level = setting.false_alarms / setting.num_jobs

    found = []
    for _ in range(num_gates):
        job, sides = _drawn(recorded, setting, random)
        without = _judged(sides, setting.threshold, level)
        for effect in effects:
            slowed = _judged(_slowed(sides, effect), setting.threshold, level)
            found.append(Planted(job.backend, effect, without, slowed))
    return found


def _judged(sides: Sides, threshold: float, level: float) -> TimeVerdict:
    return judge_times({0: sides}, threshold, level)[0]


def _slowed(sides: Sides, effect: float) -> Sides:
    """Return the sides with a candidate that is slower by `effect`, a share."""
    return replace(sides, candidate_ms=tuple(time * (1 + effect) for time in sides.candidate_ms))


def detection_rate(found: Sequence[Planted]) -> Rate:
    """Count the slowed jobs that were found."""
    return Rate(sum(some.is_found for some in found), len(found))


def seen(found: Sequence[Planted], threshold: float = THRESHOLD) -> list[Planted]:
    """Return the jobs for which the gate, before the slowdown, reported that it could see the threshold."""
    return [some for some in found if some.without.smallest_effect <= threshold]


def smallest_found(recorded: Sequence[JobNoise], setting: Setting, num_gates: int, seed: int = 0) -> float:
    """Return the smallest slowdown in `EFFECTS` that at least 95% of gates find in a random job; inf if there is none.

    The threshold of the setting does not count here. A slowdown below the threshold, which a real gate would pass,
    counts as found if the tests show it. A gate that finds a slowdown also finds every larger one.
    """
    random = np.random.default_rng(seed)
    level = setting.false_alarms / setting.num_jobs
    smallest = []
    for _ in range(num_gates):
        _, sides = _drawn(recorded, setting, random)

        def is_found(effect: float, sides: Sides = sides) -> bool:
            return _judged(_slowed(sides, effect), 0.0, level).verdict is Verdict.REGRESSED

        smallest.append(bisect_left(EFFECTS, True, key=is_found))
    position = sorted(smallest)[math.ceil(POWER * num_gates) - 1]
    return EFFECTS[position] if position < len(EFFECTS) else math.inf


# The table of docs/gating.md

HEADER = (
    *("rounds", "between processes", "false alarms", "slower by the threshold found, of jobs that say they can see it"),
    *("jobs that can", "found in any job 95 times of 100"),
)


def table(recorded: Sequence[JobNoise], settings: Sequence[Setting], between: str, num_gates: int) -> Iterator[str]:
    """Yield the rows of the table in Markdown, one row per setting. `between` is the text of the second column."""
    for setting in settings:
        found = plant(recorded, setting, [setting.threshold], 4 * num_gates)
        visible = seen(found, setting.threshold)
        cells = (
            *(f"{setting.rounds[0]} and {setting.rounds[1]}", between),
            *(false_alarms(recorded, setting, num_gates), detection_rate(visible), Rate(len(visible), len(found))),
            _share(smallest_found(recorded, setting, num_gates)),
        )
        yield "| " + " | ".join(map(str, cells)) + " |"


def _share(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "none"


def of_results(frame: pd.DataFrame, between: Sequence[float], num_gates: int, setting: Setting) -> Iterator[str]:
    """Yield the table of a gate on stored results.

    If the noise between processes was not recorded for all jobs, the table has rows for each assumed spread in
    `between`.
    """
    settings = [replace(setting, rounds=rounds) for rounds in ROUNDS]
    for assumed in between:
        recorded = noises(frame, assumed)
        if all(noise.is_recorded for noise in recorded):
            yield from table(recorded, settings, "recorded", num_gates)
            return
        yield from table(recorded, settings, f"{assumed:.1%}, assumed", num_gates)


def of_ab(a: pd.DataFrame, b: pd.DataFrame, num_gates: int, setting: Setting) -> Iterator[str]:
    """Yield the table of `moebench ab`, one row per look."""
    rounds = [(RUNS_A_SIDE * look, RUNS_A_SIDE * look) for look in schedule(setting.num_jobs)]
    settings = [replace(setting, rounds=some, false_alarms=LOOK_FALSE_ALARMS) for some in rounds]
    yield from table(noises_together(a, b), settings, "recorded", num_gates)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table. `arguments` replace the arguments of the command line if they are given."""
    parser = argparse.ArgumentParser(description="Simulate gates from recorded samples.")
    parser.add_argument("results", type=Path, help="results folder or Parquet file")
    parser.add_argument("--num-gates", type=int, default=500, help="number of simulated gates")
    parser.add_argument("--num-jobs", type=int, default=NUM_JOBS, help="number of jobs per gate")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="threshold of the gate, as a share")
    parser.add_argument(
        "--between", type=float, nargs="*", default=ASSUMED_BETWEEN, help="assumed spread, if not recorded"
    )
    parser.add_argument("--backend", nargs="*", help="only jobs of these backends")
    parser.add_argument(
        "--ab", action="store_true", help="the results are of `moebench ab` for the same revision twice"
    )
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
