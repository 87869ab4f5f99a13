"""Select the jobs of a sweep by the options of a command line."""

import math
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moebench.errors import SweepError
from moebench.workload.axes import (
    AXES,
    BACKEND_PATTERN,
    BACKEND_RULE,
    LONGEST_BACKEND,
    cut,
    did_you_mean,
    listed,
    rule_for,
)
from moebench.workload.backends import GROUPS, is_group, names_of
from moebench.workload.case import Case, Job
from moebench.workload.models import MODELS
from moebench.workload.spec import SweepSpec, find_sweep, load_sweep
from moebench.workload.traces import find_trace

_NUMBERS = tuple(name for name, field in Case.model_fields.items() if field.annotation in (int, float))
_ORDERS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def select(
    sweep: str,
    backends: Sequence[str],
    filters: Sequence[str],
    case_ids: Sequence[str],
    only: Sequence[str] = (),
) -> tuple[Job, ...]:
    """Return the jobs that a command line selects. Raises SweepError for wrong options, and if no job is left.

    `backends` are measured beside the backends of the sweep, and `only` instead of them.
    """
    return select_of(load_sweep(find_sweep(sweep)), sweep, backends, filters, case_ids, only)


def select_of(
    spec: SweepSpec,
    sweep: str,
    backends: Sequence[str],
    filters: Sequence[str],
    case_ids: Sequence[str],
    only: Sequence[str] = (),
) -> tuple[Job, ...]:
    """Return the selected jobs of `spec`, a sweep that has been read already. Messages name it by `sweep`.

    Raises SweepError as `select` does.
    """
    if backends and only:
        raise SweepError(
            ["--backend and --only exclude each other: --backend adds to the sweep's backends; choose one"]
        )
    jobs = select_backends(spec.jobs(), only) if only else add_backends(spec.jobs(), backends)
    unknown = sorted(set(case_ids) - {job.case.case_id for job in jobs}) if case_ids else []
    if unknown:
        raise SweepError(
            [
                f"case {cut(case_id)!r}: {sweep} has no case with that id; see `moebench list {sweep} --ids`"
                for case_id in unknown
            ]
        )
    chosen = tuple(job for job in filter_jobs(jobs, filters) if not case_ids or job.case.case_id in case_ids)
    if not chosen:
        options = [f"--filter {cut(text)!r}" for text in filters] + [f"--case {case_id}" for case_id in case_ids]
        raise SweepError([f"{sweep}: no job is left by {' '.join(options)}; see `moebench list {sweep}`"])
    return chosen


def filter_jobs(jobs: Sequence[Job], filters: Sequence[str]) -> list[Job]:
    """Return the jobs that pass every filter.

    A filter is KEY=V1,V2 or KEY!=V1,V2, and for numbers KEY<V, KEY<=V, KEY>V or KEY>=V. Keys are the axes of a sweep.
    Raises SweepError with the mistakes of all filters.
    """
    tests: list[Callable[[Job], bool]] = []
    mistakes: list[str] = []
    for text in filters:
        try:
            tests.append(_test(text, jobs))
        except SweepError as error:
            mistakes += error.mistakes
    if mistakes:
        raise SweepError(mistakes)
    return [job for job in jobs if all(test(job) for test in tests)]


def _test(text: str, jobs: Sequence[Job]) -> Callable[[Job], bool]:
    parts = re.fullmatch(r"\s*(\w+)\s*(!=|<=|>=|=|<|>)(.*)", text)
    keys = f"keys are {listed(AXES)}"
    if parts is None:
        raise SweepError(
            [f"filter {cut(text)!r}: must be KEY=V1,V2, KEY!=V1,V2, KEY<V, KEY<=V, KEY>V or KEY>=V; {keys}"]
        )
    key, sign, written = parts.groups()
    if key not in AXES:
        hint = did_you_mean(key, AXES)
        raise SweepError([f"filter {cut(text)!r}: there is no key {cut(key)!r}; {hint + ' ' if hint else ''}{keys}"])
    if sign in _ORDERS:
        if key not in _NUMBERS:
            raise SweepError(
                [f"filter {cut(text)!r}: {key} is not a number; use = or !=; numbers are {listed(_NUMBERS)}"]
            )
        bound, compare = _number(text, written), _ORDERS[sign]
        return lambda job: compare(_value(job, key), bound)
    words = names_of(key, map(str.strip, written.split(",")))
    models = dict.fromkeys([*MODELS, *(job.case.model for job in jobs if job.case.model is not None)])
    for word in words if key == "model" else ():
        if word not in models:
            hint = did_you_mean(word, models) or "take one of them"
            raise SweepError([f"filter {cut(text)!r}: {cut(word)!r}: must be one of {listed(models)}; {hint}"])
    values = [_filter_value(text, key, word) for word in words]
    return lambda job: (_value(job, key) in values) == (sign == "=")


def _value(job: Job, key: str) -> Any:
    return getattr(job if key in ("backend", "dispatcher") else job.case, key)


def _number(text: str, written: str) -> float:
    try:
        number = float(written)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise SweepError([f"filter {cut(text)!r}: {cut(written.strip())!r} is not a number; compare with one number"])
    return number


def _filter_value(text: str, key: str, word: str) -> object:
    try:
        value = AXES[key].validate_strings(word)
        captured = find_trace(value, Path()) if key == "routing" and value.startswith("trace:") else None
        return captured.text if captured else value
    except ValidationError as error:
        raise SweepError([f"filter {cut(text)!r}: {cut(word)!r}: {rule_for(key, word, error.errors()[0])}"]) from error


def select_backends(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """Return the cases of `jobs` with the named backends, once for each backend and each dispatcher of the case.

    A name may be a group, which stands for its members. Without names the result is `jobs`. Raises SweepError if a
    name is not valid or a group does not exist.
    """
    names = _valid(names)
    return [job for some in _by_case(jobs) for job in _crossed(some, names)] if names else list(jobs)


def add_backends(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """Return the jobs and, for each case, jobs of the named backends that the case lacks, with its dispatchers.

    Raises SweepError as `select_backends` does.
    """
    names = _valid(names)
    return [job for some in _by_case(jobs) for job in dict.fromkeys([*some, *_crossed(some, names)])]


def _valid(names: Sequence[str]) -> list[str]:
    """Return the names, each once, with groups replaced by their members. Raises SweepError for a wrong name."""
    names = names_of("backend", names)
    wrong = [name for name in names if len(name) > LONGEST_BACKEND or not re.fullmatch(BACKEND_PATTERN, name)]
    if wrong:
        rule = f"{BACKEND_RULE}; for example my_module:MyExperts"
        groups = f"there is no such group; the groups are {listed(GROUPS['backend'])}"
        raise SweepError([f"backend {cut(name)!r}: {groups if is_group('backend', name) else rule}" for name in wrong])
    return names


def _by_case(jobs: Sequence[Job]) -> list[list[Job]]:
    found: dict[Case, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.case, []).append(job)
    return list(found.values())


def _crossed(of_case: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """Return a job of each named backend with each dispatcher of one case."""
    dispatchers = {job.dispatcher: job for job in of_case}
    return [job.model_copy(update={"backend": name}) for name in names for job in dispatchers.values()]
