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

Scripts and notebooks use these names, which do not import torch:

    load             results as a pandas DataFrame
    open_result      results together with the environments that they were measured in
    pivot            a table of cases and backends
    compare          several results side by side
    plot             one panel of a plot
    parity_errors    the parity errors of each row
    Comparability    which results may be gated against each other
    ResultsError     raised for a file or folder that cannot be opened as results

docs/notebooks.md has an example of each name.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"
__all__ = [
    "Comparability",
    "ResultsError",
    "__version__",
    "compare",
    "load",
    "open_result",
    "parity_errors",
    "pivot",
    "plot",
]

if TYPE_CHECKING:
    from moebench.errors import ResultsError
    from moebench.report.plots.notebook import pivot, plot
    from moebench.results.compare import compare
    from moebench.results.folder import open_result
    from moebench.results.frame import load, parity_errors
    from moebench.verdicts.comparability import Comparability

#: The module of each public name. `__getattr__` imports it on first use, so that `import moebench` stays quick.
_HOMES = {
    "Comparability": "moebench.verdicts.comparability",
    "ResultsError": "moebench.errors",
    "compare": "moebench.results.compare",
    "load": "moebench.results.frame",
    "open_result": "moebench.results.folder",
    "parity_errors": "moebench.results.frame",
    "pivot": "moebench.report.plots.notebook",
    "plot": "moebench.report.plots.notebook",
}


if not TYPE_CHECKING:  # a type checker then reports a name that does not exist

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
