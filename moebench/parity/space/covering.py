"""Choose the covering cases: trials that together have every pair of values of any two axes that fit together.

A fault that needs one or two values of the space to show is therefore met by some case.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from moebench.parity.space.rules import fitting
from moebench.parity.space.trial import AXES, Row, Trial, of_row

#: With one of these values a layer computes nothing, or nothing that is compared, so that the other values of a case
#: are hardly tried. Cases with such a value have it once with every value of every other axis. They do not count for
#: other pairs.
NOTHING_TO_COMPUTE: Mapping[str, object] = {
    "num_tokens": 0,
    "mask": "none-kept",
    "choices": "all-dropped",
    "weights": "all-zero",
    "wanted": "nothing",
}
#: A case is begun this many times with other values for the rest of its axes, until all of its values fit together.
ATTEMPTS, GREEDY_ATTEMPTS = 40, 4

Axes = Mapping[str, Sequence[Any]]
_Value = tuple[str, Any]
_Pair = tuple[str, Any, str, Any]


def covering(axes: Axes = AXES, seed: int = 0) -> list[Trial]:
    """Return the covering cases of the axes. An axis that is left out has its simplest value."""
    main = {name: _without(values, NOTHING_TO_COMPUTE.get(name)) for name, values in axes.items()}
    rows = _Design(main, seed).rows()
    for name, value in NOTHING_TO_COMPUTE.items():
        if value in axes.get(name, ()) and len(axes[name]) > 1:
            rows += _Design({**main, name: (value,)}, seed, name).rows()
    trials = [of_row({**row, "seed": seed + number}) for number, row in enumerate(rows)]
    return sorted(trials, key=_work)


def _work(trial: Trial) -> int:
    """Return roughly what a trial costs, so that a fault that many cases show is found soon."""
    per_row = trial.dim + 2 * trial.moe_inter_dim
    repeated = 100 if "repeat" in trial.steps else len(trial.steps)
    return repeated * (trial.num_rows + 20 * trial.n_routed_experts) * (100 + per_row)


def _without(values: Sequence[Any], value: object) -> Sequence[Any]:
    return [one for one in values if one != value] or values


class _Design:
    """The pairs that no row has yet (`only` those of one axis). A row is built around one, and has many others too."""

    def __init__(self, axes: Axes, seed: int, only: str | None = None) -> None:
        self.axes = axes
        self.order = list(axes)
        self.partners: dict[_Value, set[_Value]] = {}  # the values with which a value misses a pair
        self.random = random.Random(seed)
        fixed = {name: values[0] for name, values in axes.items() if len(values) == 1}
        fit = {name: fitting(fixed, name, values) for name, values in axes.items()}
        self.missing: dict[_Pair, None] = {
            (a, one, b, other): None
            for a, b in combinations(axes, 2)
            for one in fit[a]
            for other in fit[b]
            if only in (None, a, b) and fitting({**fixed, a: one}, b, [other])
        }
        for a, one, b, other in self.missing:
            self.partners.setdefault((a, one), set()).add((b, other))
            self.partners.setdefault((b, other), set()).add((a, one))

    def rows(self) -> list[Row]:
        """Return rows that have every missing pair, except pairs that fit with no values of the other axes."""
        rows = []
        while self.missing:
            pair = next(iter(self.missing))
            row = next(filter(None, (self._row(pair, attempt) for attempt in range(ATTEMPTS))), None)
            if row is None:
                self._strike(pair)
                continue
            rows.append(row)
            for a, b in combinations(self.order, 2):
                self._strike((a, row[a], b, row[b]))
        return rows

    def _strike(self, pair: _Pair) -> None:
        if pair in self.missing:
            del self.missing[pair]
            a, one, b, other = pair
            self.partners[a, one].discard((b, other))
            self.partners[b, other].discard((a, one))

    def _row(self, pair: _Pair, attempt: int) -> Row | None:
        """Return a row with the pair, or None if the values of the other axes that were tried do not fit.

        The first attempts take the values with the most missing pairs. Later ones take any values that fit.
        """
        row = {pair[0]: pair[1], pair[2]: pair[3]}
        rest = [name for name in self.order if name not in row]
        self.random.shuffle(rest)
        gains = attempt < GREEDY_ATTEMPTS
        for name in rest:
            values = fitting(row, name, self.axes[name])
            if not values:
                return None
            # the simplest value half of the time: some faults show only if nearly all of a case is simple
            is_simple = self.random.random() < 0.5
            row[name] = max(
                values,
                key=lambda value: (
                    self._gain(row, name, value) if gains else 0,
                    is_simple and value == values[0],
                    self.random.random(),
                ),
            )
        return row

    def _gain(self, row: Row, name: str, value: Any) -> int:
        """Return how many missing pairs the value has with the values of the row."""
        partners = self.partners.get((name, value), set())
        return sum(map(partners.__contains__, row.items()))


def missing_pairs(trials: Sequence[Trial], axes: Axes = AXES) -> list[_Pair]:
    """Return the pairs of values that fit together and that no trial has."""
    met = {(a, getattr(one, a), b, getattr(one, b)) for one in trials for a, b in combinations(axes, 2)}
    wanted = [
        (a, one, b, other)
        for a, b in combinations(axes, 2)
        for one in axes[a]
        for other in axes[b]
        if "all" not in (one, other) and fitting({a: one}, b, [other])
    ]
    return [pair for pair in wanted if pair not in met]
