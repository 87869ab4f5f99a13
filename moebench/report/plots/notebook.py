"""Results in a notebook: a table of cases and backends, and one panel of a figure as matplotlib axes. No torch here."""

from collections.abc import Callable, Sequence
from textwrap import wrap

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moebench.errors import ResultsError
from moebench.report.plots import bars, lines, roofline
from moebench.report.plots.kinds import BREAKDOWN, MEMORY, PARITY, ROOFLINE, THROUGHPUT, Kind
from moebench.report.plots.look import NOTE_SIZE, RC
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
#: What one panel of each shows along its axis; in all else its rows agree.
_ALONG = {
    "throughput": ("num_tokens", "seed"),
    "memory": ("num_tokens", "seed"),
    "parity": ("num_tokens", "seed"),
    "roofline": tuple(name for name in _CASE_FIELDS if name not in ("mode", "dtype", "ep_size")),
    "breakdown": ("seed",),
}


def pivot(frame: pd.DataFrame, values: str = "time_ms", index: Sequence[str] | None = None) -> pd.DataFrame:
    """A row a case, a column a backend (with its dispatcher, `te+deepep`), in the cells a column of results.

    `index` are the columns that tell cases apart, by default all fields of the case, device and gpu that vary in
    `frame`. A job that failed, or that was not measured, is null. Raises ResultsError where a cell would hold several
    rows: select fewer, or name what tells them apart.
    """
    _known(frame, [values, *(index or [])])
    names = list(index) if index is not None else _varying(frame) or ["num_tokens"]
    rows = in_case_order(frame)
    rows = rows.assign(backend=backend_labels(rows))
    doubled = rows[rows.duplicated([*names, "backend"], keep=False)]
    if len(doubled):
        differing = [name for name in (*_CASE_FIELDS, *_PLACES, "run_id") if doubled[name].nunique(dropna=False) > 1]
        raise ResultsError(
            f"{len(doubled)} rows share a cell of {', '.join(names)} and backend: they differ in "
            f"{listed(name for name in differing if name not in names)}; select one value, or add it to index"
        )
    rows[values] = rows[values].where(rows["status"] == Status.ok) if values != "status" else rows[values]
    table = rows.set_index([*names, "backend"])[values].unstack("backend")
    return table.reindex(index=rows.set_index(names).index.unique(), columns=in_order(rows["backend"]))


def plot(frame: pd.DataFrame, kind: str = "throughput", *, ax: Axes | None = None) -> Axes:
    """One panel of a figure: throughput, memory or parity against tokens, roofline, or the breakdown under EP.

    Colours, markers and dashes are those of all plots. `ax` is a new figure's by default. Raises ResultsError where
    `frame` does not fit one panel: it says in what its rows differ that a panel shares.
    """
    if kind not in _KINDS:
        raise ResultsError(f"kind = {kind!r}: must be one of {listed(_KINDS)}")
    several = {
        name: list(map(str, frame[name].unique()))
        for name in (*_CASE_FIELDS, *_PLACES)
        if name not in _ALONG[kind] and frame[name].nunique(dropna=False) > 1
    }
    several.pop("model", None)  # its shape says as much
    if several:
        texts = [f"{name} ({', '.join(found[:4])}{', …' * (len(found) > 4)})" for name, found in several.items()]
        raise ResultsError(f"{kind}: one panel shares what its rows differ in: {'; '.join(texts)}; select one value")
    rows = in_case_order(frame)
    rows["line"] = backend_labels(rows)
    if not _KINDS[kind].points(rows)["value"].notna().any():
        raise ResultsError(f"{kind}: no row has a value to draw; see the columns status and detail")
    if ax is None:
        figure = _new_figure()
        with matplotlib.rc_context(RC):
            ax = figure.add_subplot()
    with matplotlib.rc_context(RC):
        _DRAW[kind](ax, rows)
        ax.set_title(_title(rows, _KINDS[kind]), fontsize=NOTE_SIZE)
    return ax


def _new_figure() -> Figure:
    """Made outside of a context of settings: the first figure of a notebook chooses them for good."""
    import matplotlib.pyplot as plt  # chooses a backend, which importing this must not

    return plt.figure(figsize=_SIZE_IN, layout="constrained")


def _title(rows: pd.DataFrame, kind: Kind) -> str:
    along = ("tokens", "seed") if kind is not BREAKDOWN else ()
    texts = [f"{kind.title}: {describe(rows).title(*along)}", machine(rows)]
    return "\n".join(line for text in texts for line in wrap(text, _TITLE_CHARACTERS))


def _varying(frame: pd.DataFrame) -> list[str]:
    """What tells the cases apart; a model's name stands for all that it fixes."""
    fixed = FIXED_BY_MODEL if frame["model"].notna().all() else ()
    names = [name for name in (*_CASE_FIELDS, *_PLACES) if name not in fixed]
    return [name for name in names if frame[name].nunique(dropna=False) > 1]


def _known(frame: pd.DataFrame, names: Sequence[str]) -> None:
    wrong = [name for name in names if name not in frame]
    if wrong:
        raise ResultsError(f"no column {wrong[0]!r}: there are {listed(frame.columns)}")
