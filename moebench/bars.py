"""Where the time of a forward goes under expert parallelism: bars of dispatch, compute and combine. No torch here."""

from collections.abc import Mapping
from types import MappingProxyType

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from moebench.labels import describe, in_order, panel_title
from moebench.look import LEADING_IN, NOTE_SIZE, sheet, shortened
from moebench.metrics import BREAKDOWN, PARTS, tokens_text

#: No backend's colours, and of three lightnesses.
PART_COLORS: Mapping[str, str] = MappingProxyType({"dispatch": "#2F5D8C", "compute": "#C8CDD2", "combine": "#E3874B"})
_BAR_IN = NOTE_SIZE * LEADING_IN + 0.01
_AROUND_PANEL_IN = 0.62  # title and ticks
_TOTAL_ROOM = 1.18  # of an axis over its longest bar, for the number behind it

Panels = dict[str, pd.DataFrame]


def family_figure(rows: pd.DataFrame) -> Figure:
    """The bars of a workload at its largest and a middle token count, a panel for each routing and load of the ranks.

    Parts are those of a forward: rows of mode train are shown where there are no others.
    """
    measured = rows[BREAKDOWN.points(rows).groupby(level=0)["value"].first().notna()]
    shown = rows[rows["mode"] == ("forward" if measured["mode"].eq("forward").any() else "train")]
    counts = sorted(set(measured.loc[measured.index.intersection(shown.index), "num_tokens"]))
    shown = shown[shown["num_tokens"].isin({counts[(len(counts) - 1) // 2], counts[-1]})]
    panels: Panels = {}
    places: list[tuple[str, str, int]] = sorted(
        set(zip(shown["routing"], shown["rank_load"], shown["num_tokens"], strict=True))
    )
    for routing, load, count in places:
        panel = shown[(shown["routing"] == routing) & (shown["rank_load"] == load) & (shown["num_tokens"] == count)]
        first = f"{tokens_text(count)} tokens per rank"
        panels[panel_title(shown, first, routing, load)] = panel
    return _figure(shown, panels, ("tokens",))


def page_figure(rows: pd.DataFrame) -> Figure:
    """The bars of several cases, a panel each."""
    labels = describe(rows).headings
    panels = {f"{labels[panel.index[0]]}": panel for _, panel in rows.groupby("case", sort=False)}
    return _figure(rows, panels, ())


def _figure(rows: pd.DataFrame, panels: Panels, on_axes: tuple[str, ...]) -> Figure:
    points = BREAKDOWN.points(rows).dropna(subset="value")
    lines = in_order(points["line"])
    entries: list[Artist] = [Patch(color=PART_COLORS[part], label=part) for part in PARTS]
    height_in = len(panels) * (_BAR_IN * len(lines) + _AROUND_PANEL_IN) + 0.25
    figure, body = sheet(rows, BREAKDOWN, on_axes, [entries], height_in)
    axes = body.subplots(len(panels), squeeze=False)[:, 0]
    for ax, (title, panel) in zip(axes, panels.items(), strict=True):
        ax.set_title(title)
        _draw(ax, points[points.index.isin(panel.index)], lines)
    axes[-1].set_xlabel("ms, each part that of its slowest rank")
    return figure


def _draw(ax: Axes, points: pd.DataFrame, lines: list[str]) -> None:
    """A bar a line, from the top; the number behind it is its length."""
    values = points.groupby(["line", "curve"])["value"].agg(BREAKDOWN.combine).unstack()
    values = values.reindex(index=lines, columns=list(PARTS))
    left = values[PARTS[0]] * 0
    for part in PARTS:
        ax.barh(range(len(lines)), values[part], left=left, height=0.74, color=PART_COLORS[part], label=part)
        left = left + values[part]
    for place, total in enumerate(left):
        if pd.notna(total):
            ax.annotate(
                f"{total:.3g}", (total, place), (4, 0), textcoords="offset points", va="center", fontsize=NOTE_SIZE
            )
    ax.set_yticks(range(len(lines)), [shortened(line, 32) for line in lines], fontsize=NOTE_SIZE)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, (left.max() or 1.0) * _TOTAL_ROOM)
    ax.xaxis.set_major_locator(MaxNLocator(5))
