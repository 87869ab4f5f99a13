"""Measure, check and compare the expert layers of Mixture-of-Experts models.

For scripts and notebooks, without torch: `load` results, `pivot` them into a table of cases and backends, `compare`
several results, `plot` one panel on matplotlib axes. docs/notebooks.md shows each.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "load", "pivot", "plot"]

if TYPE_CHECKING:
    from moebench.comparison import compare
    from moebench.frame import load
    from moebench.notebook import pivot, plot

#: Imported when they are asked for: `import moebench` alone stays quick.
_HOMES = {
    "compare": "moebench.comparison",
    "load": "moebench.frame",
    "pivot": "moebench.notebook",
    "plot": "moebench.notebook",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
