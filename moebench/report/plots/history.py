"""Plot a history: how the time of each backend on one case changed since the backend's first result."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moebench.errors import PictureError, ResultsError
from moebench.report.plots.kinds import Metric
from moebench.report.plots.look import line_legends, line_look, sheet
from moebench.report.plots.rendering import failure, images
from moebench.results.files import writable, write_atomically
from moebench.results.history import when
from moebench.results.labels import in_order
from moebench.results.record import Status

_BODY_IN = 3.4


_LEAST_SPAN = 0.05  # the least range of the axis, so that a history without changes looks flat


_MOST_TICKS = 5


def _points(rows: pd.DataFrame) -> pd.DataFrame:
    first = rows["time_ms"] / (1 + rows["since_first"])
    ends = {end: rows[f"time_ms_{end}"] / first - 1 for end in ("low", "high")}
    return rows.assign(curve="time", value=rows["since_first"].where(rows["status"] == Status.ok), **ends)


_HISTORY = Metric(*("history", "History", "", _points), combine="median", base=10, tick="{:g}".format)


def figure_of(rows: pd.DataFrame) -> Figure:
    """Return a figure of the change of each backend's time since its first result, with the 95% confidence interval.

    A dotted line marks a change of machine or software. It needs moebench's settings.
    """
    points = _points(rows)
    figure, body = sheet(rows, _HISTORY, (), line_legends(points, _HISTORY, joined=True), _BODY_IN)
    ax = body.subplots()
    for number, line in enumerate(in_order(points["line"])):
        some = points[points["line"] == line]
        above = number / max(1, points["line"].nunique() - 1)
        look = line_look(*some[["backend", "dispatcher"]].iloc[0], above=above)
        ax.plot(some["place"], some["value"], **look)
        ax.fill_between(some["place"], some["low"], some["high"], color=look["color"], alpha=0.25, linewidth=0)
    _frame(ax, points)
    return figure


def _frame(ax: Axes, points: pd.DataFrame) -> None:
    ax.axhline(0, color="#888888", linewidth=1.0, zorder=1)
    span = points[["value", "low", "high"]].abs().to_numpy(dtype="float64")
    most = max(_LEAST_SPAN, float(pd.Series(span.ravel()).max())) * 1.1  # the latter is NaN if no row has a time
    ax.set_ylim(-most, most)
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.yaxis.set_major_locator(MaxNLocator(7))
    ax.set_ylabel("change of time since the first result")
    runs = points.drop_duplicates("place").sort_values("place")
    step = -(-len(runs) // _MOST_TICKS)
    labels = [when(str(run)).replace(" ", "\n") for run in runs["run_id"]]
    ax.set_xticks(list(runs["place"])[::step], labels[::step])
    ax.set_xlim(-0.3, max(runs["place"]) + 0.3)
    changed = runs["env_id"] != runs["env_id"].shift(fill_value=runs["env_id"].iloc[0])
    for place in runs.loc[changed, "place"]:
        ax.axvline(place - 0.5, color="#888888", linestyle=":", linewidth=1.5, zorder=1)
    ax.set_xlabel("start (UTC)" + ("; dotted: machine or software changed" if changed.any() else ""))


def kind_of(path: Path) -> str:
    """Return "png" or "svg", as the suffix of `path` says. Raises ResultsError if the suffix is another one."""
    if path.suffix not in (".png", ".svg"):
        raise ResultsError(f"{path}: a plot is written as .png or .svg; give it one of these suffixes")
    return path.suffix[1:]


def draw_history(rows: pd.DataFrame, path: Path) -> None:
    """Write the plot of a history as PNG or SVG. The suffix of `path` decides.

    Raises ResultsError if the suffix is neither of these two, and PictureError if the plot cannot be drawn.
    """
    kind = kind_of(path)
    try:
        image = images(lambda: figure_of(rows), (kind,))[kind]
    except Exception as error:
        raise PictureError(failure(path.stem, error)) from error
    with writable(path):
        write_atomically(path, image)
