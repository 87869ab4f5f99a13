"""Draw the replay of captured routing: the times of its steps, and the load of its experts and ranks."""

import math

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moebench.report.plots.kinds import REPLAY
from moebench.report.plots.look import NOTE_SIZE, sheet, shortened, style
from moebench.report.tables.cells import human
from moebench.results.labels import in_order

_LOAD_COLOR, _MEAN_COLOR = "#2F5D8C", "#E3874B"
_BAR_IN, _LOAD_IN, _AROUND_IN = 0.28, 1.5, 0.75
_ROOM = 1.35  # the length of the axis of times over its longest bar, for the numbers beside the bar


def case_figure(rows: pd.DataFrame) -> Figure:
    """Return the figure of one case: p50 and p99 over its steps for each backend, rows per expert, and rows per rank.

    Experts are in the order of their load. There are rows per rank only if the case has several ranks.
    """
    measured = rows.dropna(subset="expert_rows")
    loads = {"expert": np.sort(np.asarray(measured["expert_rows"].iloc[0]))[::-1]}
    if measured["ep_size"].iloc[0] > 1:
        loads["rank"] = np.asarray(measured["rank_rows"].iloc[0])
    times_in = rows["line"].nunique() * _BAR_IN + _AROUND_IN
    heights = [times_in, *[_LOAD_IN + _AROUND_IN] * len(loads)]
    figure, body = sheet(rows, REPLAY, (), [_entries()], sum(heights))
    times, *others = body.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    _draw_times(times, REPLAY.points(rows))
    for ax, (of, load) in zip(others, loads.items(), strict=True):
        _draw_load(ax, of, load, float(measured[f"{of}_skew"].iloc[0]))
    return figure


def _entries() -> list[Artist]:
    return [
        Patch(color="#8A929A", label="p50 over steps"),
        Line2D([], [], color="#202428", marker="|", markersize=9, linestyle="-", label="up to p99"),
        Line2D([], [], color=_MEAN_COLOR, linestyle="--", label="even load"),
    ]


def _draw_times(ax: Axes, points: pd.DataFrame) -> None:
    """Draw one bar per line, from the top: its length is p50, and a stroke goes on to p99."""
    lines = in_order(points["line"])
    values = points.groupby(["line", "curve"])["value"].agg(REPLAY.combine).unstack().reindex(lines).astype("float64")
    backends = points.drop_duplicates("line").set_index("line")["backend"]
    for place, (line, p50, p99) in enumerate(zip(lines, *(values[curve] for curve in REPLAY.curves), strict=True)):
        if math.isnan(p50):
            continue
        ax.barh(place, p50, height=0.7, color=style(str(backends[line]))[0])
        ax.plot([p50, p99], [place, place], color="#202428", marker="|", markersize=9, linewidth=1.2)
        note = f"{human(p50)}, p99 {human(p99)}"
        ax.annotate(note, (p99, place), (5, 0), textcoords="offset points", va="center", fontsize=NOTE_SIZE)
    ax.set_title("ms of a step")
    ax.set_yticks(range(len(lines)), [shortened(line, 32) for line in lines], fontsize=NOTE_SIZE)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.set_xlim(0, _ROOM * (float(values.max().max()) or 1.0))
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


def _draw_load(ax: Axes, of: str, load: "np.ndarray[tuple[int], np.dtype[np.int64]]", skew: float) -> None:
    share = load / load.mean() if load.any() else load
    ax.bar(range(len(share)), share, width=0.85, color=_LOAD_COLOR)
    ax.axhline(1, color=_MEAN_COLOR, linestyle="--", linewidth=1)
    ax.set_title(f"rows per {of} / mean")
    order = "experts, the busiest first" if of == "expert" else "ranks"
    ax.set_xlabel(f"{order}; the busiest of a step has {skew:.3g} × the mean")
    if of == "rank":
        ax.set_xticks(range(len(share)))
    ax.set_ylim(bottom=0)
    ax.grid(visible=False, axis="x")
