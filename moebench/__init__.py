"""Measure, check and compare the expert layers of Mixture-of-Experts models.

A run flows through the folders from left to right; each imports only what stands before it, and `cli` all of them:

    workload ─┬─> run ──> measure + parity ──> results ──> verdicts ──> report
    machine ──┘

    workload   what is measured: sweep file -> cases -> seeded inputs
    machine    where: GPUs, library versions, environments
    run        plan -> worker processes -> journal
    measure    in a worker: build, check, time and weigh one job
    parity     is it right: reference, budget, checks
    results    rows of results: journal, frame, comparison, advice
    verdicts   did a change make it slower, larger or wrong
    report     tables, plots, pages

For scripts and notebooks, without torch: `load` results, or `open_result` with their environments beside them; `pivot`
them into a table of cases and backends, `compare` several, `plot` one panel, read `parity_errors`; `Comparability` says
which results may be gated against each other. What cannot be opened raises `ResultsError`. docs/notebooks.md shows
each.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
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

#: Imported when they are asked for, so that `import moebench` alone stays quick.
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


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
