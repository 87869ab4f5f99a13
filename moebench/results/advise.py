"""Choose a backend for a workload, from measured results only.

If a backend was measured at the token count that the user asks for, `advise` takes that measurement. If the count lies
between two measured counts, and the larger count is at most `MOST_APART` times the smaller one, `advise` interpolates:
the logarithm of the time lies on a straight line over the logarithm of the token count, and so do the other values.
`advise` never extrapolates.

A backend without an answer is in one of two lists. `left_out` has those that cannot be taken: they are not installed,
not supported, or wrong. `unmeasured` has those that no result answers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from moebench.errors import UsageError, first_mistake
from moebench.results.labels import backend_labels, machine, shape_names
from moebench.results.record import Status
from moebench.results.stats import THRESHOLD
from moebench.workload.axes import cut
from moebench.workload.backends import adapters_of
from moebench.workload.case import Case, adam_bytes, weight_bytes
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
_VALUES = (
    *("time_ms", "time_ms_low", "time_ms_high", "graph_time_ms"),
    *("peak_memory_bytes", "saved_memory_bytes", "tokens_per_s"),
)
NOT_INSTALLED, NOT_SUPPORTED, WRONG = "not installed", "not supported", "wrong"
#: What `experts.catalog.missing` says of a library that cannot be imported.
_MISSING = ("is not installed", "does not import")


@dataclass(frozen=True)
class Candidate:
    """A backend with its dispatcher, and its values at the token count that the user asked for.

    Times are in ms. `time_ms_low` and `time_ms_high` are the ends of the 95% confidence interval of `time_ms`.
    `graph_time_ms` is the time of a replayed CUDA graph. `peak_memory_bytes` is what the pass takes beside the weights
    and inputs, and `train_peak_bytes` is the same of a forward and backward pass, gradients included.
    `saved_memory_bytes` is what forward keeps for backward, NaN in mode forward. `weight_bytes` and `adam_bytes` follow
    from the shape. What was not measured is NaN.
    """

    label: str
    backend: str
    dispatcher: str
    time_ms: float
    time_ms_low: float
    time_ms_high: float
    graph_time_ms: float
    peak_memory_bytes: float
    saved_memory_bytes: float
    tokens_per_s: float
    train_peak_bytes: float
    weight_bytes: int
    adam_bytes: int
    measured_at: tuple[int, ...]  # the token count of the question, or the two measured counts around it
    run_ids: tuple[str, ...]

    @property
    def is_interpolated(self) -> bool:
        return len(self.measured_at) > 1

    @property
    def pass_bytes(self) -> float:
        """The weights and what the pass takes beside them."""
        return self.weight_bytes + self.peak_memory_bytes

    @property
    def step_bytes(self) -> float:
        """What a train step with Adam in float32 takes: weights, gradients, activations and the optimizer's state."""
        return self.weight_bytes + self.train_peak_bytes + self.adam_bytes

    def times(self, first: "Candidate") -> tuple[float, float, float]:
        """Return this time divided by the time of `first`, and the least and the largest ratio of their intervals."""
        ends = self.time_ms_low / first.time_ms_high, self.time_ms_high / first.time_ms_low
        return self.time_ms / first.time_ms, *ends

    def is_close_to(self, faster: "Candidate") -> bool:
        """Whether this candidate or `faster`, which has the lower time, may be the faster one.

        It is true if their 95% confidence intervals overlap, or if their times differ by less than `CLOSE`. The second
        rule is needed because an interval comes from one process, and the time of the next process may lie outside it.
        """
        return faster.time_ms_high >= self.time_ms_low or self.time_ms / faster.time_ms < 1 + CLOSE


@dataclass(frozen=True)
class Advice:
    """The advice from one machine's results.

    `candidates` are the backends to choose from, the fastest first. `left_out` has backends that cannot be taken, each
    with a reason that begins with NOT_INSTALLED, NOT_SUPPORTED or WRONG. `unmeasured` has the backends that no result
    answers, each with what was measured instead. `gpu` is the name of the GPU; None on a CPU.
    """

    machine: str
    gpu: str | None
    candidates: tuple[Candidate, ...]
    left_out: dict[str, str]
    unmeasured: dict[str, str]

    @property
    def times_the_next(self) -> float | None:
        """The time of the second candidate divided by the time of the first; None if there are fewer than two."""
        return self.candidates[1].time_ms / self.candidates[0].time_ms if len(self.candidates) > 1 else None

    @property
    def is_close(self) -> bool:
        """Whether the second candidate may be as fast as the first."""
        return len(self.candidates) > 1 and self.candidates[1].is_close_to(self.candidates[0])

    @property
    def places(self) -> tuple[int, ...]:
        """The place of each candidate, from 1. Candidates share a place if they are close to the first one on it."""
        places: list[int] = []
        for at, one in enumerate(self.candidates):
            is_tie = at > 0 and one.is_close_to(self.candidates[places[-1] - 1])
            places.append(places[-1] if is_tie else at + 1)
        return tuple(places)


@dataclass(frozen=True)
class Answer:
    """What results say about a workload: one advice for each machine that has measured it at any token count.

    `others` describes what the results have instead, if no machine has a candidate.
    """

    asked: Case
    advices: tuple[Advice, ...]
    others: tuple[str, ...] = ()

    @property
    def has_candidates(self) -> bool:
        return any(advice.candidates for advice in self.advices)


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
    """Return the rows of `frame` that measured the workload `asked`, at any token count.

    Backends that train adapters are left out, because their step is another one.
    """
    wanted = asked.model_dump(exclude=set(_FREE))
    is_whole = frame["backend"].map(lambda name: adapters_of(str(name)) is None).astype(bool)
    return frame[frame[list(wanted)].eq(pd.Series(wanted)).all(axis=1) & is_whole]


def advise(frame: pd.DataFrame, asked: Case) -> Answer:
    """Return what the results in `frame` say about the workload `asked`."""
    trains = matching(frame, asked.model_copy(update={"mode": "train"}))
    steps = dict(iter(trains.groupby(_place(trains))))
    here = matching(frame, asked)
    found = tuple(_advice(some, steps.get(at, trains.iloc[:0]), asked) for at, some in here.groupby(_place(here)))
    answer = Answer(asked, found)
    return answer if answer.has_candidates else Answer(asked, found, tuple(elsewhere(frame, asked)))


def _place(rows: pd.DataFrame) -> "list[pd.Series[str]]":
    return [rows[name].astype("str").fillna("") for name in ("device", "gpu")]


def _advice(here: pd.DataFrame, steps: pd.DataFrame, asked: Case) -> Advice:
    """Return the advice from the rows `here` of one machine. `steps` are its rows of mode train."""
    candidates, left_out, unmeasured = [], {}, {}
    of_steps = backend_labels(steps)
    for label, line in here.groupby(backend_labels(here)):
        values, reason = _judge(_newest(line), asked.num_tokens)
        if values is not None:
            train, _ = _judge(_newest(steps[of_steps == label]), asked.num_tokens)
            name, dispatcher = (str(text) for text in line[["backend", "dispatcher"]].iloc[0])
            found: dict[str, Any] = {
                **values.numbers,
                "train_peak_bytes": math.nan if train is None else train.numbers["peak_memory_bytes"],
                "weight_bytes": weight_bytes(asked),
                "adam_bytes": adam_bytes(asked),
                "measured_at": values.measured_at,
                "run_ids": values.run_ids,
            }
            candidates.append(Candidate(label=str(label), backend=name, dispatcher=dispatcher, **found))
        elif reason.startswith((NOT_INSTALLED, NOT_SUPPORTED, WRONG)):
            left_out[str(label)] = reason
        else:
            unmeasured[str(label)] = reason
    candidates.sort(key=lambda one: one.time_ms)
    gpu = here["gpu"].dropna()
    return Advice(machine(here), str(gpu.iloc[0]) if len(gpu) else None, tuple(candidates), left_out, unmeasured)


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


@dataclass(frozen=True)
class _Values:
    """The values of one backend at the token count that was asked for, and the rows that they come from."""

    numbers: dict[str, float]
    measured_at: tuple[int, ...]
    run_ids: tuple[str, ...]


def _judge(line: pd.DataFrame, num_tokens: int) -> tuple[_Values | None, str]:
    """Return the values of one backend's rows, or None and the reason why there are none."""
    failed = line[(line["num_tokens"] == num_tokens) & (line["status"] != Status.ok)]
    if len(failed):
        return None, _reason(Status(failed["status"].iloc[0]), failed["detail"].iloc[0].partition("\n")[0])
    counts = sorted(int(count) for count in line.loc[line["status"] == Status.ok, "num_tokens"].unique())
    around = _around(counts, num_tokens)
    if not around:
        return None, tokens_list(counts) if counts else "never measured with status ok"
    at = line[line["num_tokens"].isin(around)]
    values = at.groupby("num_tokens")[list(_VALUES)].median().astype("float64")
    low, high = values.iloc[0], values.iloc[-1]
    share = math.log(num_tokens / around[0]) / math.log(around[-1] / around[0]) if len(around) > 1 else 0.0
    here = {name: float(low[name] ** (1 - share) * high[name] ** share) for name in _VALUES}
    return _Values(here, tuple(around), tuple(dict.fromkeys(at["run_id"]))), ""


def _reason(status: Status, detail: str) -> str:
    """Return why a backend is left out, or that it is not measured: a job that took too long is not known to be wrong.

    The reason begins with one of the three words if the backend is left out.
    """
    if status is Status.timeout:
        return f"no result within the time: {detail}"
    if status is Status.unsupported:
        return f"{NOT_INSTALLED if any(text in detail for text in _MISSING) else NOT_SUPPORTED}: {detail}"
    return f"{NOT_SUPPORTED}: out of memory: {detail}" if status is Status.oom else f"{WRONG}: {status.value}: {detail}"


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
