"""Run checks and measurements from Python. Backends run in worker processes, as with the command line."""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moebench.api.backends import importable, names_of
from moebench.api.shown import Checked, Measured
from moebench.errors import ResultsError, SweepError
from moebench.report.console import messages
from moebench.report.folder import finish
from moebench.report.progress import job_progress
from moebench.run import request, start
from moebench.run.audit import Level, Request, audit
from moebench.run.runfile import Asked
from moebench.workload.axes import cut
from moebench.workload.models import shape_fields

_NAME = "bench"
_PLACE = re.compile(r"^grid\[\d+\](\.|: )")


def check(
    backend: Any,
    *,
    level: Level = "quick",
    seconds: float | None = None,
    dtypes: str | Sequence[str] = (),
    device: str | None = None,
    seed: int = 0,
) -> Checked:
    """Search for a case on which a backend is wrong, and return what was found. The result is true if it passed.

    `backend` is a name such as "triton" or "my_module:MyExperts", or a class that a module defines. `level` is "quick"
    for the covering cases, or "standard" for a search after them, in all two minutes. Raises ResultsError for anything
    that is not one backend.
    """
    names = names_of(backend)
    if len(names) > 1:
        raise ResultsError(f"{len(names)} backends to check: give one; for several, call check for each")
    if level not in ("quick", "standard"):
        raise ResultsError(f"level = {level!r}: it must be quick or standard")
    asked = Request(level, seconds, (), _texts("dtypes", dtypes), device, seed)
    with importable(names), job_progress(messages()) as progress:
        return Checked(
            audit(
                names,
                asked,
                required=names,
                on_plan=lambda name, num_jobs: progress.plan(num_jobs, name),
                on_record=progress.done,
            )
        )


def bench(
    backends: Any,
    *,
    model: str | os.PathLike[str] | Sequence[str],
    num_tokens: int | Sequence[int],
    device: str | None = None,
    gpus: str | None = None,
    rounds: int = 1,
    time_budget_min: float | None = None,
    out: str | os.PathLike[str] | None = None,
    **axes: Any,
) -> Measured:
    """Check and time backends on the layer of a model, and return the results.

    `backends` is a backend or a list of backends, as in `check`. `model` is the name of a model, a shape such as
    "e64k6d1024i512", or a config.json of Hugging Face (docs/sweeps.md). `axes` are other axes of sweeps, such as
    `mode`, `dtype`, `routing` and `ep_size`. The values of an axis may be a list. Raises ResultsError for anything that
    is not a backend, and SweepError for wrong axes.
    """
    names = names_of(backends)
    text = _sweep_text(names, _texts("model", model), {"num_tokens": num_tokens, **axes})
    own = tuple(name for name in names if ":" in name)
    asked = Asked(backends=own, device=device, rounds=_rounds(rounds))
    with tempfile.TemporaryDirectory(prefix="moebench-bench-") as folder:
        sweep = Path(folder) / f"{_NAME}.toml"
        sweep.write_text(text)
        try:
            return _measured(str(sweep), asked, names, out, gpus, time_budget_min)
        except SweepError as error:  # the caller did not write this file
            raise SweepError([_PLACE.sub("", line.removeprefix(f"{sweep}: ")) for line in error.mistakes]) from error


def run_sweep(
    sweep: str | os.PathLike[str],
    *,
    backends: Any = (),
    only: Any = (),
    filters: str | Sequence[str] = (),
    device: str | None = None,
    gpus: str | None = None,
    rounds: int = 1,
    time_budget_min: float | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Measured:
    """Measure a sweep, and return the results.

    `sweep` is a sweep file, or the name of a sweep that comes with moebench. `backends` are measured beside the
    backends of the sweep, and `only` instead of them; both are as in `check`. `filters` select jobs, as with
    `moebench run --filter`. Raises SweepError for a wrong sweep or filter.
    """
    if not isinstance(sweep, str | os.PathLike):
        raise ResultsError(f"sweep is a {type(sweep).__name__}: it must be a sweep file, or the name of a sweep")
    added, alone = ([] if given in ((), []) else names_of(given) for given in (backends, only))
    asked = Asked(
        backends=tuple(added),
        only=tuple(alone),
        filters=_texts("filters", filters),
        device=device,
        rounds=_rounds(rounds),
    )
    return _measured(os.fspath(sweep), asked, [*added, *alone], out, gpus, time_budget_min)


def _measured(
    sweep: str,
    asked: Asked,
    names: Sequence[str],
    out: str | os.PathLike[str] | None,
    gpus: str | None,
    time_budget_min: float | None,
) -> Measured:
    plan = request.plan(sweep, asked, out=None if out is None else Path(out), time_budget_min=time_budget_min)
    plan, notes = request.on_gpus(plan, gpus, share=False)
    notes = [*plan.notes, *notes]
    with importable(names), request.in_own_folder(plan) as plan, job_progress(messages()) as progress:
        progress.plan(plan.num_jobs)
        outcome = start.start_run(plan, progress.done)
        progress.doing("writing tables, plots and the report")
        written = finish(plan.folder)
    left = [f"{outcome.num_left} jobs left; go on with `moebench run --resume {plan.folder}`"] * bool(outcome.num_left)
    if not outcome.records:
        raise ResultsError(f"no job was measured: {'; '.join(left)}; give more time")
    return Measured(plan.folder, (*notes, *outcome.notes, *written.failures, *left))


def _sweep_text(backends: Sequence[str], models: Sequence[str], axes: Mapping[str, Any]) -> str:
    """Return a sweep file with one grid for each model."""
    lines = [f'name = "{_NAME}"', 'description = "moebench.bench"']
    for model in models:
        grid = {"backend": list(backends), **model_axes(model), **{name: _plain(name, axes[name]) for name in axes}}
        lines += ["", "[[grid]]", *(f"{name} = {json.dumps(values)}" for name, values in grid.items())]
    return "\n".join([*lines, ""])


def model_axes(model: str) -> dict[str, Any]:
    """Return the axes of a sweep that a model stands for."""
    return shape_fields(model) or {"model": str(Path(model).absolute()) if Path(model).exists() else model}


def _plain(name: str, values: Any) -> Any:
    """Return the values of an axis as a sweep file can hold them. Raises ResultsError for other values."""
    several = isinstance(values, list | tuple | set | range) or hasattr(values, "tolist")
    found = [getattr(value, "item", lambda value=value: value)() for value in (values if several else [values])]
    wrong = [value for value in found if not isinstance(value, bool | int | float | str)]
    if wrong:
        raise ResultsError(f"{name} = {cut(repr(wrong[0]))}: it must be a number or a text, or a list of them")
    return found


def _texts(name: str, given: Any) -> tuple[str, ...]:
    """Return one text or several as a tuple. Raises ResultsError for anything else."""
    several = given if isinstance(given, list | tuple) else [given]
    wrong = [text for text in several if not isinstance(text, str | os.PathLike)]
    if wrong:
        raise ResultsError(f"{name} = {cut(repr(wrong[0]))}: it must be a text, or a list of texts")
    return tuple(os.fspath(text) for text in several)


def _rounds(rounds: Any) -> int:
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ResultsError(f"rounds = {rounds!r}: it must be a whole number, 1 or more")
    return rounds
