"""The declaration of a column of results besides its type: its meaning, its unit, and how its rounds combine."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Any

from pydantic import BaseModel


class Rounds(StrEnum):
    """How the values of several rounds make one value of the row. Rounds without a value do not count."""

    SAME = "same in all"
    OF_WORST = "of the worst round"
    COMPUTED = "computed"  # from other columns, by moebench.results.rounds
    SUM = "sum"
    WORST = "largest"  # for an object, key by key
    MEDIAN = "median"
    LOWER_MEDIAN = "lower median"  # always one of the values, so that an integer stays an integer
    ALL = "true if all are"
    EVERY = "all that occur"  # texts are joined by " | "
    SAMPLES = "one after another"  # lists with one entry per sample; the CSV leaves these columns out


@dataclass(frozen=True)
class Column:
    """The declaration of a column. It stands in the annotation of a field of `Record`.

    `means` and `null` appear in docs/results.md; `null` says when a cell is null. Only a row with status ok may have a
    value in a column with `is_speed`.
    """

    rounds: Rounds
    means: str
    unit: str = ""
    null: str = "unless ok"
    is_speed: bool = False


def columns_of(model: type[BaseModel]) -> dict[str, Column]:
    """Return the declaration of each field. A field without one belongs to a case; its description is the meaning."""
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


#: How to combine the values of one or more rounds into one value.
COMBINE: Mapping[Rounds, Callable[[Sequence[Any]], Any]] = {
    Rounds.SUM: sum,
    Rounds.WORST: _worst,
    Rounds.MEDIAN: statistics.median,
    Rounds.LOWER_MEDIAN: statistics.median_low,
    Rounds.ALL: all,
    Rounds.EVERY: _every,
    Rounds.SAMPLES: lambda values: tuple(chain.from_iterable(values)),
}
