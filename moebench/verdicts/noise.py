"""How the times of one job vary, as recorded: in rounds, in samples of a process, in rounds of `ab`. No torch here."""

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

#: Fewer recorded rounds than this say too little of how rounds are spread.
MIN_RECORDED = 5

_FloatArray = NDArray[np.float64]


class JobNoise(Protocol):
    """What two sides of one job, between which nothing changed, may have measured."""

    @property
    def backend(self) -> str: ...

    @property
    def is_recorded(self) -> bool:
        """Whether the noise between processes is recorded rather than assumed."""

    def sides(self, random: np.random.Generator, rounds: tuple[int, int], session: float) -> Sides:
        """So many rounds; all of a side shifted by chance of the standard deviation `session`, as on another day."""


@dataclass(frozen=True)
class Noise:
    """Of sides measured apart: recorded rounds, or samples of one process and what is assumed between processes."""

    backend: str
    log_rounds: _FloatArray
    log_samples: _FloatArray
    between: float

    @property
    def is_recorded(self) -> bool:
        return len(self.log_rounds) >= MIN_RECORDED

    def sides(self, random: np.random.Generator, rounds: tuple[int, int], session: float) -> Sides:
        one, two = (np.exp(self.draw(random, size) + random.normal(0, session)) for size in rounds)
        return Sides(tuple(one.tolist()), tuple(two.tolist()))

    def draw(self, random: np.random.Generator, num_rounds: int) -> _FloatArray:
        """Logarithms of the medians of so many rounds, around 0."""
        if self.is_recorded:
            picked = random.choice(self.log_rounds, num_rounds)
            return np.asarray(picked + random.normal(0, _bandwidth(self.log_rounds), num_rounds))
        return np.asarray(self._medians(random, num_rounds) + random.normal(0, self.between, num_rounds))

    def _medians(self, random: np.random.Generator, num_rounds: int) -> _FloatArray:
        """Medians of as many samples as were recorded, in circular blocks of their number's square root."""
        size = len(self.log_samples)
        block = max(1, round(math.sqrt(size)))
        starts = random.integers(0, size, (num_rounds, -(-size // block)))
        picked = (starts[:, :, None] + np.arange(block)).reshape(num_rounds, -1)[:, :size] % size
        return np.asarray(np.median(self.log_samples[picked], axis=1))


@dataclass(frozen=True)
class NoiseTogether:
    """Of sides measured side by side by `moebench ab`: recorded rounds, a row each, of all its processes."""

    backend: str
    log_rounds: _FloatArray

    @property
    def is_recorded(self) -> bool:
        return True

    def sides(self, random: np.random.Generator, rounds: tuple[int, int], session: float = 0.0) -> Sides:
        """Rounds drawn from those recorded, their processes shared out anew. Side by side there is but one session."""
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
    """Silverman's rule: of the standard deviation or, where outliers make that larger, the quartiles' on its scale."""
    low, high = np.percentile(values, (25, 75))
    return float(0.9 * min(np.std(values, ddof=1), (high - low) / 1.349) * len(values) ** -0.2)


def noises(frame: pd.DataFrame, between: float) -> list[Noise]:
    """The noise of every job of a result that has a time; `between` where one process was recorded."""
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
    """The noise of every job that both sides of an `ab` have a time of; nothing must have changed between them."""
    others = {key_of(row): row for row in b.to_dict("records") if is_ok(row)}
    found = []
    for row in filter(is_ok, a.to_dict("records")):
        if key_of(row) in others:
            found.append(NoiseTogether(row["backend"], _log_rounds(rounds_of(row), rounds_of(others[key_of(row)]))))
    return found


def _log_rounds(one: Mapping[int, float], two: Mapping[int, float]) -> _FloatArray:
    """A row a round that is complete, those of its processes on both sides, around their median."""
    blocks = dict.fromkeys(map(block_of, one))
    rows = [[side[run] for side in (one, two) for run in side if block_of(run) == block] for block in blocks]
    whole = np.log([row for row in rows if len(row) == 2 * RUNS_A_SIDE])
    return np.asarray(whole - np.median(whole, axis=1, keepdims=True))
