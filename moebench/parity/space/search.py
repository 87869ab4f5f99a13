"""Search the space of trials at random, and find the smallest trial that fails. Hypothesis draws and shrinks."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, count
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, assume, find, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from moebench.parity.space.covering import Axes
from moebench.parity.space.programs import STEPS, Program
from moebench.parity.space.rules import fitting, misfits
from moebench.parity.space.trial import AXES, Row, Trial, of_row

#: Trials are drawn in batches of this many. Each batch has a seed of its own.
BATCH = 50
#: Programs of the search have at most this many steps.
MOST_STEPS = 6
#: The search for the smallest trial that fails takes at most this long, and this many trials.
SHRINK_S = 20.0
SHRINK_TRIALS = 400

_SETTINGS = settings(
    max_examples=BATCH,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    verbosity=Verbosity.quiet,
)


def drawn(axes: Axes = AXES, first_seed: int = 0) -> Iterator[Trial]:
    """Yield random trials without end. The same seed gives the same trials."""
    for number in count(first_seed):
        yield from _batch(axes, number)


def _batch(axes: Axes, number: int) -> list[Trial]:
    found: dict[Trial, None] = {}  # hypothesis draws some trials twice

    @seed(number)
    @settings(_SETTINGS, phases=[Phase.generate])
    @given(trials(axes))
    def keep(trial: Trial) -> None:
        found[trial] = None

    keep()
    return list(found)


@st.composite
def trials(draw: st.DrawFn, axes: Axes = AXES) -> Trial:
    """Draw a trial whose values fit together. About half of its values are the simplest ones."""
    row: Row = {name: values[0] for name, values in axes.items() if len(values) == 1}  # what the others must fit with
    for name, values in axes.items():
        if name in row:
            continue
        fit = fitting(row, name, values) or list(values[:1])
        row[name] = draw(st.one_of(st.just(fit[0]), st.sampled_from(fit), *_others(name, row, values)))
    trial = of_row({**row, "seed": draw(st.integers(0, 999))})
    assume(next(misfits(trial), None) is None)
    return trial


def _others(name: str, row: Row, values: Sequence[Any]) -> list[st.SearchStrategy[Any]]:
    """Return strategies for values between those of an axis."""
    if len(values) < 2:
        return []
    if name == "steps":
        programs = st.lists(st.sampled_from(list(STEPS)), min_size=1, max_size=MOST_STEPS).map(tuple)
        return [programs.filter(lambda program: bool(fitting(row, name, [program])))]
    if name in ("num_tokens", "dim", "moe_inter_dim", "n_routed_experts"):
        most = 140 if name == "num_tokens" else 70
        return [st.integers(1, most).filter(lambda value: bool(fitting(row, name, [value])))]
    return []


def smallest(failing: Trial, fails: Callable[[Trial], bool], is_late: Callable[[], bool], axes: Axes = AXES) -> Trial:
    """Return the simplest trial found that fails, between the simplest trial of all and `failing`.

    A trial between them has, on every axis, the value of `failing` or a simpler one. Hypothesis draws such trials until
    one fails, and shrinks it. `is_late` says when to stop; ranks must all stop together.
    """
    best, known = failing, {failing: True}

    def still_fails(trial: Trial) -> bool:
        nonlocal best
        if trial not in known:
            known[trial] = not is_late() and fails(trial)
        if known[trial] and size(trial) < size(best):
            best = trial
        return known[trial]

    before = None
    while best != before and not is_late():
        before = best
        limits = settings(_SETTINGS, max_examples=SHRINK_TRIALS, phases=[Phase.generate, Phase.shrink])
        try:
            find(_between(best, axes), still_fails, settings=limits, random=random.Random(failing.seed))
        except HypothesisException:  # nothing simpler fails, or a fault that comes and goes
            continue
    return best


def size(trial: Trial) -> tuple[int, ...]:
    """Return what is compared to find the simpler of two trials: its steps, its sizes, then how odd its values are."""
    oddness = sum(_rank(name, getattr(trial, name)) for name in AXES if name != "steps")
    elements = (trial.num_tokens + trial.n_routed_experts) * (trial.dim + trial.moe_inter_dim)
    return len(trial.steps), elements, oddness, sum(":" in step for step in trial.steps)


def _rank(name: str, value: Any) -> int:
    values = AXES[name]
    return values.index(value) if value in values else len(values)


@st.composite
def _between(draw: st.DrawFn, failing: Trial, axes: Axes) -> Trial:
    row: Row = {"seed": failing.seed}
    for name, values in axes.items():
        own = getattr(failing, name)
        simpler = _subprograms(own) if name == "steps" else _simpler(values, own)
        fit = fitting(row, name, simpler)
        # one list, in which hypothesis goes from `own` to the simplest value; in it `own` is as frequent as all others
        row[name] = draw(st.sampled_from([*fit, *fitting(row, name, [own]) * max(1, len(fit))] or [own]))
    return of_row(row)


def _simpler(values: Sequence[Any], own: Any) -> list[Any]:
    if isinstance(own, int) and not isinstance(own, bool):
        return [value for value in values if isinstance(value, int) and 0 < value < own]
    return list(values[: values.index(own)] if own in values else values)


def _subprograms(program: Program) -> list[Program]:
    """Return the programs that leave some steps out, the shortest first."""
    return [tuple(kept) for length in range(1, len(program)) for kept in dict.fromkeys(combinations(program, length))]
