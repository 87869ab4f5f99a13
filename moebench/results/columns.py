"""Declare columns of results: what a column means, its unit, and how the values of several rounds make one value."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, PlainSerializer


def jsonable(number: float) -> float | str:
    """Return a finite number unchanged, and any other as "inf", "-inf" or "nan", which JSON cannot write as numbers."""
    return number if math.isfinite(number) else str(number)


#: Every document writes infinity as "inf".
IN_JSON = PlainSerializer(jsonable, when_used="json")
#: The largest time, about 31 years. A larger number is no measurement, and its square would overflow.
LONGEST_MS = 1e12
#: The time of a sample or a median, at least a millionth of a nanosecond: its inverse must not overflow.
Time = Annotated[float, Field(ge=1e-12, le=LONGEST_MS)]
#: A time that may be zero, because it is a part or a difference of times.
Part = Annotated[float, Field(ge=0, le=LONGEST_MS)]
Rate = Annotated[float, Field(ge=0, le=1e30)]
#: Files of results hold integers in 64 bits. A difference of memory may be negative.
Bytes = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
#: An error divided by its budget. An error that is not a number is infinite.
Error = Annotated[float, AfterValidator(lambda error: math.inf if math.isnan(error) else error), IN_JSON]


class Rounds(StrEnum):
    """The rule by which the values of several rounds make one value of the row. Rounds without a value do not count."""

    SAME = "same in all"
    OF_WORST = "of the worst round"
    COMPUTED = "computed"  # moebench.results.rounds computes the value from other columns
    SUM = "sum"
    WORST = "largest"  # if the values are dictionaries, the largest value of each key
    MEDIAN = "median"
    LOWER_MEDIAN = "lower median"  # always one of the values, so that an integer stays an integer
    ALL = "true if all are"
    EVERY = "all that occur"  # texts are joined by " | "
    SAMPLES = "one after another"  # lists with one entry per sample; the CSV leaves these columns out


@dataclass(frozen=True)
class Column:
    """The declaration of a column of results.

    Each column is a field of the class `Record`, and the field's type is `Annotated[type, Column(…)]`.

    `rounds`: how the values of several rounds make one value.
    `means`: what the column means, as docs/results.md explains it.
    `unit`: the unit of the values; empty if they have none.
    `null`: when a cell of the column is null, as docs/results.md explains it. If it ends in "unless ok", only a row
    with status `ok` may have a value.
    """

    rounds: Rounds
    means: str
    unit: str = ""
    null: str = "unless ok"

    @property
    def only_if_ok(self) -> bool:
        return self.null.endswith("unless ok")


def columns_of(model: type[BaseModel]) -> dict[str, Column]:
    """Return the declaration of each field of `model`.

    A field without a `Column` is a field of the case. Its declaration is made of the field's description.
    """
    found = {}
    for name, field in model.model_fields.items():
        of_case = Column(Rounds.SAME, field.description or "", null="not set")
        found[name] = next((some for some in field.metadata if isinstance(some, Column)), of_case)
    return found


def _worst(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: max(value[key] for value in values if key in value) for key in dict.fromkeys(chain(*values))}
    return max(values)


def _every(values: Sequence[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(dict.fromkeys(chain.from_iterable(values)))
    return " | ".join(dict.fromkeys(values))


#: For each rule, the function that makes one value of the values of one or more rounds.
COMBINE: Mapping[Rounds, Callable[[Sequence[Any]], Any]] = {
    Rounds.SUM: sum,
    Rounds.WORST: _worst,
    Rounds.MEDIAN: statistics.median,
    Rounds.LOWER_MEDIAN: statistics.median_low,
    Rounds.ALL: all,
    Rounds.EVERY: _every,
    Rounds.SAMPLES: lambda values: tuple(chain.from_iterable(values)),
}
