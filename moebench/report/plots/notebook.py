"""Show results in a notebook, as a table of cases and backends or as one panel of a figure."""

from collections.abc import Callable, Sequence
from textwrap import wrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moebench.errors import ResultsError
from moebench.report.plots import bars, lines, roofline
from moebench.report.plots.kinds import BREAKDOWN, MEMORY, PARITY, ROOFLINE, THROUGHPUT, Kind
from moebench.report.plots.look import NOTE_SIZE
from moebench.report.plots.settings import settings
from moebench.results.labels import CASE_ORDER, backend_labels, describe, in_case_order, in_order, machine
from moebench.results.record import Status
from moebench.workload.axes import FIXED_BY_MODEL, listed
from moebench.workload.case import Case

_CASE_FIELDS = tuple(name for name in CASE_ORDER if name in Case.model_fields)
_PLACES = ("device", "gpu")
_TITLE_CHARACTERS = 62
_SIZE_IN = (7.2, 4.4)

_KINDS: dict[str, Kind] = {kind.name: kind for kind in (THROUGHPUT, MEMORY, PARITY, ROOFLINE, BREAKDOWN)}
_DRAW: dict[str, Callable[[Axes, pd.DataFrame], None]] = {
    "throughput": lambda ax, rows: lines.panel(ax, rows, THROUGHPUT),
    "memory": lambda ax, rows: lines.panel(ax, rows, MEMORY),
    "parity": lambda ax, rows: lines.panel(ax, rows, PARITY),
    "roofline": roofline.panel,
    "breakdown": bars.panel,
}
#: The fields in which the rows of one panel may differ. All other fields must have one value.
_ALONG = {
    "throughput": ("num_tokens", "seed"),
    "memory": ("num_tokens", "seed"),
    "parity": ("num_tokens", "seed"),
    "roofline": tuple(name for name in _CASE_FIELDS if name not in ("mode", "dtype", "ep_size")),
    "breakdown": ("seed",),
}


def pivot(frame: pd.DataFrame, values: str = "time_ms", index: Sequence[str] | None = None) -> pd.DataFrame:
    """Return a table with one row per case and one column per backend (with its dispatcher, as in `te+deepep`).

    The cells have the values of the column `values` of the results. `index` are the columns that distinguish cases. By
    default, `index` is all of device, gpu and the fields of the case that vary in `frame`. The cell of a job that
    failed or was not measured is null. Raises ResultsError if several rows belong to one cell. The remedy is to select
    fewer rows, or to add a column to `index`.
    """
    _known(frame, [values, *(index or [])])
    names = list(index) if index is not None else _varying(frame) or ["num_tokens"]
    rows = in_case_order(frame)
    rows = rows.assign(backend=backend_labels(rows))
    doubled = rows[rows.duplicated([*names, "backend"], keep=False)]
    if len(doubled):
        differing = [name for name in (*_CASE_FIELDS, *_PLACES, "run_id") if doubled[name].nunique(dropna=False) > 1]
        raise ResultsError(
            f"{len(doubled)} rows have the same {', '.join(names)} and backend: they differ in "
            f"{listed(name for name in differing if name not in names)}; select one value, or add it to index"
        )
    rows[values] = rows[values].where(rows["status"] == Status.ok) if values != "status" else rows[values]
    table = rows.set_index([*names, "backend"])[values].unstack("backend")
    return table.reindex(index=rows.set_index(names).index.unique(), columns=in_order(rows["backend"]))


def plot(frame: pd.DataFrame, kind: str = "throughput", *, ax: Axes | None = None) -> Axes:
    """Draw one panel, and return its matplotlib axes.

    A panel shows throughput, memory or parity against tokens, the roofline, or the parts of a forward pass under expert
    parallelism.

    Colours, markers and dashes are the same as in all plots. If `ax` is None, the panel is on a new figure. Raises
    ResultsError if the rows of `frame` differ in fields that must have one value in a panel.
    """
    if kind not in _KINDS:
        raise ResultsError(f"kind = {kind!r}: must be one of {listed(_KINDS)}")
    several = {
        name: list(map(str, frame[name].unique()))
        for name in (*_CASE_FIELDS, *_PLACES)
        if name not in _ALONG[kind] and frame[name].nunique(dropna=False) > 1
    }
    several.pop("model", None)  # the shape already differs
    if several:
        texts = [f"{name} ({', '.join(found[:4])}{', …' * (len(found) > 4)})" for name, found in several.items()]
        raise ResultsError(
            f"{kind}: the rows of one panel must agree, but they differ in: {'; '.join(texts)}; select one value"
        )
    rows = in_case_order(frame)
    rows["line"] = backend_labels(rows)
    if not _KINDS[kind].points(rows)["value"].notna().any():
        raise ResultsError(f"{kind}: no row has a value to draw; see the columns status and detail")
    if ax is None:
        figure = _new_figure()
        with settings():
            ax = figure.add_subplot()
    with settings():
        _DRAW[kind](ax, rows)
        ax.set_title(_title(rows, _KINDS[kind]), fontsize=NOTE_SIZE)
    return ax


def _new_figure() -> Figure:
    """Return a new figure. Call this outside of `settings`.

    The first figure of a notebook would keep the settings of the block.
    """
    import matplotlib.pyplot as plt  # selects matplotlib's backend, which an import of this module must not do

    return plt.figure(figsize=_SIZE_IN, layout="constrained")


def _title(rows: pd.DataFrame, kind: Kind) -> str:
    along = ("tokens", "seed") if kind is not BREAKDOWN else ()
    texts = [f"{kind.title}: {describe(rows).title(*along)}", machine(rows)]
    return "\n".join(line for text in texts for line in wrap(text, _TITLE_CHARACTERS))


def _varying(frame: pd.DataFrame) -> list[str]:
    """Return the columns that vary between cases.

    If all rows have a model, the column `model` replaces the columns of the shape that the model determines.
    """
    fixed = FIXED_BY_MODEL if frame["model"].notna().all() else ()
    names = [name for name in (*_CASE_FIELDS, *_PLACES) if name not in fixed]
    return [name for name in names if frame[name].nunique(dropna=False) > 1]


def _known(frame: pd.DataFrame, names: Sequence[str]) -> None:
    wrong = [name for name in names if name not in frame]
    if wrong:
        raise ResultsError(f"no column {wrong[0]!r}: the columns are {listed(frame.columns)}")
