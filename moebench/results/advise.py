"""Choose a backend for a workload, from measured results only.

If a backend was measured at the token count that the user asks for, `advise` takes that measurement. If the count lies
between two measured counts, and the larger count is at most `MOST_APART` times the smaller one, `advise` interpolates:
the logarithm of the time lies on a straight line over the logarithm of the token count, and so do the other values.
`advise` never extrapolates.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from moebench.errors import UsageError, first_mistake
from moebench.results.labels import backend_labels, machine, shape_names
from moebench.results.record import Status
from moebench.results.stats import THRESHOLD
from moebench.workload.axes import cut
from moebench.workload.case import Case
from moebench.workload.modelconfig import read_model
from moebench.workload.models import SHAPE_AXES, Model

#: The largest ratio of two token counts to interpolate between. Between counts that are further apart, the time may not
#: follow a straight line.
MOST_APART = 8
#: If one backend is faster than another by a smaller share than this, the two count as equally fast.
CLOSE = THRESHOLD

#: Fields of a case in which a matching row may differ from the question. `model` is only a name of the shape, and
#: `advise` combines rows with several token counts and seeds.
_FREE = ("model", "num_tokens", "seed")
_VALUES = ("time_ms", "time_ms_low", "time_ms_high", "peak_memory_bytes", "tokens_per_s")


@dataclass(frozen=True)
class Candidate:
    """A backend with its dispatcher, and its values at the token count that the user asked for.

    Times are in ms. `time_ms_low` and `time_ms_high` are the ends of the 95% confidence interval of `time_ms`.
    `peak_memory_bytes` is NaN if no memory was measured.
    """

    label: str
    backend: str
    dispatcher: str
    time_ms: float
    time_ms_low: float
    time_ms_high: float
    peak_memory_bytes: float
    tokens_per_s: float
    measured_at: tuple[int, ...]  # the token count of the question, or the two measured counts around it
    run_ids: tuple[str, ...]

    @property
    def is_interpolated(self) -> bool:
        return len(self.measured_at) > 1


@dataclass(frozen=True)
class Advice:
    """The advice from one machine's results.

    `candidates` are the backends to choose from, the fastest first. `left_out` has the other backends, each with the
    reason why it is not a candidate.
    """

    machine: str
    candidates: tuple[Candidate, ...]
    left_out: dict[str, str]

    @property
    def times_the_next(self) -> float | None:
        """The time of the second candidate divided by the time of the first; None if there are fewer than two."""
        return self.candidates[1].time_ms / self.candidates[0].time_ms if len(self.candidates) > 1 else None

    @property
    def is_close(self) -> bool:
        """Whether either of the first two candidates may be the faster one.

        It is true if their 95% confidence intervals overlap, or if their times differ by less than `CLOSE`. The second
        rule is needed because an interval comes from one process, and the time of the next process may lie outside it.
        """
        if self.times_the_next is None:
            return False
        return self.candidates[0].time_ms_high >= self.candidates[1].time_ms_low or self.times_the_next < 1 + CLOSE


def question(model: str | Path | Model, num_tokens: int, **more: object) -> Case:
    """Return the workload that the user asks about, as a case.

    `model` is a model, or what `read_model` takes: a name, a shape, or a configuration. `more` are other fields of the
    case. Raises UsageError for a model or a value that a case cannot have.
    """
    asked = read_model(model)
    fields = asked.fields
    try:
        return Case.model_validate(asked.values(num_tokens=num_tokens, **more))
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        if not field:
            raise UsageError(f"--model {asked} with these options: {first_mistake(error)}") from error
        if field in fields:
            raise UsageError(f"--model {asked}: {first_mistake(error)}") from error
        rule = first_mistake(error).partition(": ")[2]
        raise UsageError(f"--{field.replace('_', '-')} {cut(str(first['input']))}: {rule}") from error


def matching(frame: pd.DataFrame, asked: Case) -> pd.DataFrame:
    """Return the rows of `frame` that measured the workload `asked`, at any token count."""
    wanted = asked.model_dump(exclude=set(_FREE))
    return frame[frame[list(wanted)].eq(pd.Series(wanted)).all(axis=1)]


def advise(frame: pd.DataFrame, asked: Case) -> list[Advice]:
    """Return one advice for each machine that has measured the workload at any token count."""
    rows = matching(frame, asked)
    rows = rows.assign(label=backend_labels(rows))
    found = []
    for _, here in rows.groupby(["device", "gpu"], dropna=False):
        candidates, left_out = [], {}
        for label, line in here.groupby("label"):
            judged = _judge(_newest(line), asked.num_tokens)
            if isinstance(judged, Candidate):
                candidates.append(judged)
            else:
                left_out[str(label)] = judged
        candidates.sort(key=lambda one: one.time_ms)
        found.append(Advice(machine(here), tuple(candidates), left_out))
    return found


def elsewhere(frame: pd.DataFrame, asked: Case) -> list[str]:
    """Return descriptions of what the results have instead of the workload.

    The descriptions are the other settings of its shape. If the results do not have the shape, they are other shapes.
    """
    shape = frame[list(SHAPE_AXES)].eq(pd.Series({name: getattr(asked, name) for name in SHAPE_AXES})).all(axis=1)
    if not shape.any():
        return list(dict.fromkeys(shape_names(frame)))
    settings = frame.loc[shape, ["dtype", "mode", "routing", "ep_size", "rank_load"]].drop_duplicates()
    return [f"{dtype} {mode} {routing} EP {ranks} {load}" for dtype, mode, routing, ranks, load in settings.to_numpy()]


def _newest(line: pd.DataFrame) -> pd.DataFrame:
    """Keep one row for each token count and seed: the row of the latest run. Run ids begin with the time of the run."""
    return line.sort_values("run_id").drop_duplicates(["num_tokens", "seed"], keep="last")


def _judge(line: pd.DataFrame, num_tokens: int) -> Candidate | str:
    """Return the candidate made of one backend's rows, or the reason why the backend is left out."""
    failed = line[(line["num_tokens"] == num_tokens) & (line["status"] != Status.ok)]
    if len(failed):
        return f"{failed['status'].iloc[0]}: {failed['detail'].iloc[0].partition(chr(10))[0]}"
    counts = sorted(int(count) for count in line.loc[line["status"] == Status.ok, "num_tokens"].unique())
    around = _around(counts, num_tokens)
    if not around:
        return f"measured at {tokens_list(counts)}" if counts else "never measured with status ok"
    at = line[line["num_tokens"].isin(around)]
    values = at.groupby("num_tokens")[list(_VALUES)].median().astype("float64")
    low, high = values.iloc[0], values.iloc[-1]
    share = math.log(num_tokens / around[0]) / math.log(around[-1] / around[0]) if len(around) > 1 else 0.0
    here = {name: float(low[name] ** (1 - share) * high[name] ** share) for name in _VALUES}
    name, dispatcher = at[["backend", "dispatcher"]].iloc[0]
    runs = tuple(dict.fromkeys(at["run_id"]))
    return Candidate(line["label"].iloc[0], name, dispatcher, **here, measured_at=tuple(around), run_ids=runs)


def _around(counts: Sequence[int], num_tokens: int) -> list[int]:
    """Return the measured counts to use: `num_tokens` itself, or else the two counts around it.

    The list is empty if `num_tokens` lies outside the measured counts, or if the two counts are too far apart.
    """
    if num_tokens in counts:
        return [num_tokens]
    below = max((count for count in counts if 0 < count < num_tokens), default=None)
    above = min((count for count in counts if count > num_tokens), default=None)
    if below is None or above is None or above > MOST_APART * below:
        return []
    return [below, above]


def tokens_list(counts: Iterable[int]) -> str:
    """Return token counts in words: 16, 128 and 512 tokens."""
    texts = [str(count) for count in counts]
    return f"{', '.join(texts[:-1])}{' and ' if len(texts) > 1 else ''}{texts[-1]} tokens"
