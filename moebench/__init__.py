"""Measure, check and compare the expert layers of Mixture-of-Experts models.

The data of a run flow through the folders from left to right. docs/architecture.md says which folder may import which.
The folder `cli` has the command line and imports all folders:

    workload ─┬─> run ──> measure + parity ──> results ──> verdicts ──> report
    machine ──┘

    workload   what is measured: sweep file -> cases -> seeded inputs
    machine    where it is measured: GPUs, library versions, environments
    run        how a sweep is run: plan -> worker processes -> journal
    measure    what a worker does with one job: build it, check it, measure its time and memory
    parity     whether a backend computes the right thing: oracle, budgets, judge, search for a case that fails
    results    rows of results: journal, frame, comparison, advice
    verdicts   whether a change made a job slower, larger or wrong
    report     tables, plots, pages

    api        what scripts and notebooks call

Scripts and notebooks use these names, which do not import torch:

    check            search for a case on which a backend is wrong
    bench            check and time backends on the layer of a model
    run_sweep        measure a sweep
    advise           the fastest backend for a workload, by results that are there
    load             results as a pandas DataFrame
    open_result      results together with the environments that they were measured in
    pivot            a table of cases and backends
    compare          several results side by side
    gate_results     a verdict on each job of two results
    plot             one panel of a plot
    parity_errors    the parity errors of each row
    Comparability    which results may be gated against each other
    MoebenchError    the base of all errors that moebench raises on purpose
    ResultsError     raised for anything that is not what a function takes

docs/notebooks.md has an example of each name.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from moebench.api.runs import bench, check, run_sweep
    from moebench.api.views import advise, compare, gate_results, load, open_result, parity_errors, pivot, plot
    from moebench.errors import MoebenchError, ResultsError
    from moebench.verdicts.comparability import Comparability

__all__ = [
    "Comparability",
    "MoebenchError",
    "ResultsError",
    "__version__",
    "advise",
    "bench",
    "check",
    "compare",
    "gate_results",
    "load",
    "open_result",
    "parity_errors",
    "pivot",
    "plot",
    "run_sweep",
]

_RUNS, _VIEWS = "moebench.api.runs", "moebench.api.views"
#: The module of each public name. `__getattr__` imports it on first use, so that `import moebench` stays quick.
_HOMES = {
    "Comparability": "moebench.verdicts.comparability",
    "MoebenchError": "moebench.errors",
    "ResultsError": "moebench.errors",
    **dict.fromkeys(("bench", "check", "run_sweep"), _RUNS),
    **dict.fromkeys(
        ("advise", "compare", "gate_results", "load", "open_result", "parity_errors", "pivot", "plot"), _VIEWS
    ),
}


if not TYPE_CHECKING:  # a type checker then reports a name that does not exist

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
