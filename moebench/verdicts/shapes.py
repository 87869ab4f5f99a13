"""Simulate gates whose rounds have noise of a known shape: false alarms, wrong passes and decided jobs.

    python -m moebench.verdicts.shapes [--num-gates N] [--num-jobs N]

The command prints a table of docs/gating.md. moebench.verdicts.simulate draws from recorded times. This module draws
from shapes of noise that are hard for a gate. All noise is relative: rounds are drawn as logarithms of times.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import betaincinv

from moebench.results.stats import THRESHOLD
from moebench.verdicts.ranksum import Floats
from moebench.verdicts.simulate import Rate, alarms
from moebench.verdicts.times import FALSE_ALARMS, Sides, judge_times
from moebench.verdicts.verdict import Verdict

ROUNDS = (5, 10, 20)
NUM_GATES, NUM_JOBS = 1000, 40
#: The jobs of each gate that are also judged on their own: unchanged, slower by the threshold, and slower by twice it.
JUDGED_JOBS = 2
CONFIDENCE = 0.95

#: A function that draws the logarithms of rounds. It gets the number of series and the number of rounds of each.
Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]


def log_normal(spread: float) -> Draw:
    """Return independent rounds with a standard deviation of `spread`."""
    return lambda random, size: random.normal(0, spread, size)


def two_regimes(apart: float, share: float, spread: float) -> Draw:
    """Return independent rounds at one of two speeds. The slower one has the probability `share`."""
    return lambda random, size: apart * (random.random(size) < share) + random.normal(0, spread, size)


def heavy_tails(scale: float) -> Draw:
    """Return independent rounds of Student's distribution with two degrees of freedom, which has no variance."""
    return lambda random, size: scale * random.standard_t(2, size)


def autocorrelated(correlation: float, spread: float) -> Draw:
    """Return a first-order autoregressive series with the standard deviation `spread`."""

    def draw(random: np.random.Generator, size: tuple[int, int]) -> Floats:
        steps = random.normal(0, spread, size)
        steps[:, 1:] *= np.sqrt(1 - correlation**2)
        for number in range(1, size[1]):
            steps[:, number] += correlation * steps[:, number - 1]
        return np.asarray(steps)

    return draw


@dataclass(frozen=True)
class Shape:
    """A shape of noise.

    `draw` draws the rounds of one session. All rounds of a session also share a shift with the standard deviation
    `shift`. The baseline has `sessions` sessions, or one for each round if it has fewer rounds. The candidate has one.
    """

    draw: Draw
    shift: float = 0.0
    sessions: int = 1

    def family(self, random: np.random.Generator, num_rounds: int, num_jobs: int) -> list[Sides]:
        """Return random rounds of two sides of each job, between which nothing changed. Jobs are independent."""
        ends = np.linspace(0, num_rounds, min(self.sessions, num_rounds) + 1).round().astype(int)
        sizes = np.diff(ends).tolist()
        baseline = np.concatenate([self._session(random, (num_jobs, size)) for size in sizes], axis=1)
        candidate = self._session(random, (num_jobs, num_rounds))
        sessions = tuple(np.repeat(np.arange(len(sizes)), sizes).tolist()), (0,) * num_rounds
        both = zip(np.exp(baseline).tolist(), np.exp(candidate).tolist(), strict=True)
        return [Sides(tuple(one), tuple(two), sessions=sessions) for one, two in both]

    def _session(self, random: np.random.Generator, size: tuple[int, int]) -> Floats:
        return np.asarray(self.draw(random, size) + random.normal(0, self.shift, (size[0], 1)))


#: Every shape by its name in the table.
SHAPES = {
    "log-normal, 0.3%": Shape(log_normal(0.003)),
    "two regimes, 1% apart": Shape(two_regimes(0.01, 0.3, 0.001)),
    "heavy tails": Shape(heavy_tails(0.002)),
    "neighbours correlate by 0.8, 0.3%": Shape(autocorrelated(0.8, 0.003)),
    "neighbours correlate by 0.8, 1%": Shape(autocorrelated(0.8, 0.01)),
    "sessions shifted by 0.3%, baseline of 5": Shape(log_normal(0.001), 0.003, 5),
    "sessions shifted by 0.3%, baseline of 10": Shape(log_normal(0.001), 0.003, 10),
}
#: What a gate cannot see. The gate says so in a note.
NOT_COVERED = {"not covered: sessions shifted by 0.3%, one a side": Shape(log_normal(0.001), 0.003)}


@dataclass(frozen=True)
class Outcome:
    """What simulated gates found.

    `false_alarms`: the gates in which nothing changed and a job was called REGRESSED. `wrong_passes`: the jobs slower
    by the threshold that passed. `unchanged`, `slowed`: the verdicts on jobs that did not change, and on jobs slower by
    twice the threshold.
    """

    false_alarms: Rate
    wrong_passes: Rate
    unchanged: Counter[Verdict]
    slowed: Counter[Verdict]

    def share(self, verdict: Verdict, *, slowed: bool = False) -> float:
        counts = self.slowed if slowed else self.unchanged
        return counts[verdict] / counts.total()


def simulate(shape: Shape, num_rounds: int, num_gates: int, num_jobs: int = NUM_JOBS, seed: int = 0) -> Outcome:
    """Simulate gates with `num_rounds` rounds a side. `num_jobs` jobs of each gate have independent noise."""
    random, level = np.random.default_rng(seed), FALSE_ALARMS / num_jobs
    num_alarms = 0
    verdicts: dict[float, Counter[Verdict]] = {effect: Counter() for effect in (0.0, THRESHOLD, 2 * THRESHOLD)}
    for _ in range(num_gates):
        family = shape.family(random, num_rounds, num_jobs)
        num_alarms += alarms(family, THRESHOLD, FALSE_ALARMS)
        for sides in family[:JUDGED_JOBS]:
            for effect, counts in verdicts.items():
                slow = replace(sides, candidate_ms=tuple(time * (1 + effect) for time in sides.candidate_ms))
                counts[judge_times({0: slow}, THRESHOLD, level)[0].verdict] += 1
    unchanged, threshold, slowed = verdicts.values()
    passes = Rate(threshold[Verdict.PASS], threshold.total())
    return Outcome(Rate(num_alarms, num_gates), passes, unchanged, slowed)


def upper_bound(rate: Rate) -> float:
    """Return the upper end of the one-sided 95% confidence interval of a rate (Clopper and Pearson)."""
    if rate.count == rate.total:
        return 1.0
    return float(betaincinv(rate.count + 1, rate.total - rate.count, CONFIDENCE))


HEADER = (
    *("noise", "rounds a side", "false alarms", "slower by 3%: PASS"),
    *("unchanged: PASS", "unchanged: INCONCLUSIVE", "slower by 6%: REGRESSED"),
)


def table(num_gates: int, num_jobs: int) -> Iterator[str]:
    """Yield the rows of the table in Markdown."""
    for name, shape in (SHAPES | NOT_COVERED).items():
        for num_rounds in ROUNDS:
            found = simulate(shape, num_rounds, num_gates, num_jobs)
            shares = (
                *(found.share(verdict) for verdict in (Verdict.PASS, Verdict.INCONCLUSIVE)),
                found.share(Verdict.REGRESSED, slowed=True),
            )
            cells = name, num_rounds, found.false_alarms, found.wrong_passes, *(f"{share:.1%}" for share in shares)
            yield "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table. `arguments` replace the arguments of the command line if they are given."""
    parser = argparse.ArgumentParser(description="Simulate gates whose rounds have noise of a known shape.")
    parser.add_argument("--num-gates", type=int, default=NUM_GATES, help="number of simulated gates")
    parser.add_argument("--num-jobs", type=int, default=NUM_JOBS, help="number of jobs per gate")
    asked = parser.parse_args(arguments)
    print("| " + " | ".join(HEADER) + " |")
    print("| --- " * len(HEADER) + "|")
    for line in table(asked.num_gates, asked.num_jobs):
        print(line, flush=True)


if __name__ == "__main__":
    main()
