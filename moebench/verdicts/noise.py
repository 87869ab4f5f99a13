"""Draw random rounds of one job, from how its recorded times vary between rounds, in one process, or in an `ab`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moebench.verdicts.findings import is_ok, rounds_of
from moebench.verdicts.looks import RUNS_A_SIDE, block_of
from moebench.verdicts.times import Sides
from moebench.workload.case import key_of

#: The fewest recorded rounds that show well enough how rounds vary.
MIN_RECORDED = 5

_FloatArray = NDArray[np.float64]


class JobNoise(Protocol):
    """A source of random rounds for two sides of one job between which nothing changed."""

    @property
    def backend(self) -> str: ...

    @property
    def is_recorded(self) -> bool:
        """Whether the noise between processes is recorded rather than assumed."""

    def sides(self, random: np.random.Generator, rounds: tuple[int, int], session: float) -> Sides:
        """Return `rounds` random rounds of each side.

        All rounds of a side share one random shift, as if each side was measured on another day. `session` is the
        standard deviation of the shift, as a share.
        """


@dataclass(frozen=True)
class Noise:
    """The noise of one job if its two sides are measured apart.

    `log_rounds` and `log_samples` are the logarithms of the recorded rounds and samples, minus their median. If at
    least `MIN_RECORDED` rounds were recorded, the noise comes from the rounds. Otherwise it comes from the samples of
    one process and from `between`, the assumed standard deviation between processes.
    """

    backend: str
    log_rounds: _FloatArray
    log_samples: _FloatArray
    between: float

    @property
    def is_recorded(self) -> bool:
        return len(self.log_rounds) >= MIN_RECORDED

    def sides(self, random: np.random.Generator, rounds: tuple[int, int], session: float) -> Sides:
        one, two = (np.exp(self.draw(random, size) + random.normal(0, session)) for size in rounds)
        return Sides(tuple(one.tolist()), tuple(two.tolist()), sessions=((0,) * rounds[0], (0,) * rounds[1]))

    def draw(self, random: np.random.Generator, num_rounds: int) -> _FloatArray:
        """Return the logarithms of the medians of `num_rounds` random rounds. The logarithms vary around 0."""
        if self.is_recorded:
            picked = random.choice(self.log_rounds, num_rounds)
            return np.asarray(picked + random.normal(0, _bandwidth(self.log_rounds), num_rounds))
        return np.asarray(self._medians(random, num_rounds) + random.normal(0, self.between, num_rounds))

    def _medians(self, random: np.random.Generator, num_rounds: int) -> _FloatArray:
        """Return the logarithms of medians of samples that are drawn in circular blocks.

        Each round has as many samples as were recorded. The length of a block is the square root of that number.
        """
        size = len(self.log_samples)
        block = max(1, round(math.sqrt(size)))
        starts = random.integers(0, size, (num_rounds, -(-size // block)))
        picked = (starts[:, :, None] + np.arange(block)).reshape(num_rounds, -1)[:, :size] % size
        return np.asarray(np.median(self.log_samples[picked], axis=1))


@dataclass(frozen=True)
class NoiseTogether:
    """The noise of one job if `moebench ab` measures its two sides together.

    `log_rounds` has one row per recorded round and one column per process.
    """

    backend: str
    log_rounds: _FloatArray

    @property
    def is_recorded(self) -> bool:
        return True

    def sides(self, random: np.random.Generator, rounds: tuple[int, int], session: float = 0.0) -> Sides:
        """Draw recorded rounds, and assign the processes of each round to the two sides at random. Ignore `session`."""
        num_rounds = rounds[0] // RUNS_A_SIDE
        drawn = random.permuted(self.log_rounds[random.integers(len(self.log_rounds), size=num_rounds)], axis=1)
        drawn = np.exp(drawn + random.normal(0, self._bandwidth, drawn.shape))
        one, two = (tuple(some.ravel().tolist()) for some in np.split(drawn, 2, axis=1))
        blocks = tuple(block_of(run) for run in range(len(one)))
        return Sides(one, two, (blocks, blocks))

    @property
    def _bandwidth(self) -> float:
        return _bandwidth((self.log_rounds - np.median(self.log_rounds, axis=1, keepdims=True)).ravel())


def _bandwidth(values: _FloatArray) -> float:
    """Return the bandwidth by Silverman's rule.

    The spread is the standard deviation or the scaled distance between the quartiles, whichever is smaller. Outliers
    make only the standard deviation larger.
    """
    low, high = np.percentile(values, (25, 75))
    return float(0.9 * min(np.std(values, ddof=1), (high - low) / 1.349) * len(values) ** -0.2)


def noises(frame: pd.DataFrame, between: float) -> list[Noise]:
    """Return the noise of every job that has a time. `between` applies to jobs with too few recorded rounds."""
    rows = [row for row in frame.to_dict("records") if is_ok(row)]
    return [
        Noise(row["backend"], _centred([*rounds_of(row).values()]), _centred(row["samples_ms"]), between)
        for row in rows
        if len(rounds_of(row)) >= 1
    ]


def _centred(times_ms: Sequence[float]) -> _FloatArray:
    logs = np.log(np.asarray(times_ms, float))
    return np.asarray(logs - np.median(logs))


def noises_together(a: pd.DataFrame, b: pd.DataFrame) -> list[NoiseTogether]:
    """Return the noise of every job that has a time in both results of an `ab`. Both must be of the same code."""
    others = {key_of(row): row for row in b.to_dict("records") if is_ok(row)}
    found = []
    for row in filter(is_ok, a.to_dict("records")):
        if key_of(row) in others:
            found.append(NoiseTogether(row["backend"], _log_rounds(rounds_of(row), rounds_of(others[key_of(row)]))))
    return found


def _log_rounds(one: Mapping[int, float], two: Mapping[int, float]) -> _FloatArray:
    """Return one row per complete round: the log times of all its processes on both sides, minus their median."""
    blocks = dict.fromkeys(map(block_of, one))
    rows = [[side[run] for side in (one, two) for run in side if block_of(run) == block] for block in blocks]
    whole = np.log([row for row in rows if len(row) == 2 * RUNS_A_SIDE])
    return np.asarray(whole - np.median(whole, axis=1, keepdims=True))
