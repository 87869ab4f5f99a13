"""Draw how long dispatch, compute, combine and backward take under expert parallelism, as bars beside the whole time.

The parts of a pass were measured in other calls than its time. If they add up to another time, the bar says so.
"""

from collections.abc import Mapping
from textwrap import wrap
from types import MappingProxyType

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from moebench.report.plots.kinds import BREAKDOWN, PARTS, tokens_text
from moebench.report.plots.look import BAD, LEADING_IN, NOTE_SIZE, legend_below, sheet, shortened
from moebench.report.tables.cells import human
from moebench.results.labels import describe, in_order, panel_title

#: No backend has these colours. Their lightness differs, so that they can be told apart without colour.
PART_COLORS: Mapping[str, str] = MappingProxyType(
    {"dispatch": "#2F5D8C", "compute": "#C8CDD2", "combine": "#E3874B", "backward": "#8C9AA8"}
)
#: If the sum of the parts differs from the time by more than this share of the time, the bar says so.
MOST_APART = 0.1
_BAR_IN = NOTE_SIZE * LEADING_IN + 0.01
_TITLE_IN, _TITLE_CHARACTERS = 0.24, 36  # one line of a panel's title, and its most characters
_AROUND_PANEL_IN = 0.38  # ticks and space
_TOTAL_ROOM = 1.42  # the length of an axis over its longest bar, for the number beside the bar

_LABEL = "ms on the slowest rank"

_WHOLE, _OF_WHOLE = "#000000", "time of the pass; red: over 10% apart"

Panels = list[tuple[str, pd.DataFrame]]


def case_in(num_lines: int) -> float:
    """Return the approximate height in inches of a case in an overview, where each case has its own panel."""
    return num_lines * _BAR_IN + _TITLE_IN + _AROUND_PANEL_IN


def in_family(family: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows of a workload family its figure may show.

    The figure may show all rows with tokens if they have several token counts, and otherwise no rows.
    """
    has_tokens = family["num_tokens"] > 0
    return has_tokens & (family.loc[has_tokens, "num_tokens"].nunique() > 1)


def family_figure(rows: pd.DataFrame) -> Figure:
    """Return the bars of a workload at two token counts, with one panel per mode, routing and load.

    One token count is the largest. The other token count is one of the smaller counts that have the most backends.
    """
    measured = rows.loc[BREAKDOWN.points(rows).dropna(subset="value").index.unique()]
    *smaller, largest = measured.groupby("num_tokens")["line"].nunique().items()
    widest = [count for count, width in smaller if width == max(width for _, width in smaller)]
    shown = rows[rows["num_tokens"].isin([*widest[len(widest) // 2 :][:1], largest[0]])]
    panels: Panels = []
    for _, panel in shown.groupby(list(_PLACE)):
        mode, routing, load, count = panel[list(_PLACE)].iloc[0]
        title = panel_title(shown, f"{tokens_text(count)} tokens per rank", routing, load)
        panels.append((title if shown["mode"].nunique() == 1 else f"{title}, {mode}", panel))
    return _figure(shown, panels, ("tokens", "mode") if shown["mode"].eq("forward").all() else ("tokens",))


_PLACE = ("mode", "routing", "rank_load", "num_tokens")


def page_figure(rows: pd.DataFrame) -> Figure:
    """Return the bars of several cases, with one panel per case."""
    headings = dict(zip(rows.index, describe(rows).headings, strict=True))
    return _figure(rows, [(headings[panel.index[0]], panel) for _, panel in rows.groupby("case", sort=False)], ())


def _figure(rows: pd.DataFrame, panels: Panels, on_axes: tuple[str, ...]) -> Figure:
    points = BREAKDOWN.points(rows)
    has_value = points.dropna(subset="value").index
    panels = [(title, panel) for title, panel in panels if panel.index.isin(has_value).any()]
    titles = [wrap(title, _TITLE_CHARACTERS) or [""] for title, _ in panels]
    heights_in = [
        case_in(panel["line"].nunique()) + _TITLE_IN * (len(title) - 1)
        for title, (_, panel) in zip(titles, panels, strict=True)
    ]
    figure, body = sheet(rows, BREAKDOWN, on_axes, [_entries()], sum(heights_in) + 0.25)
    axes = body.subplots(len(panels), squeeze=False, height_ratios=heights_in)[:, 0]
    for ax, title, (_, panel) in zip(axes, titles, panels, strict=True):
        ax.set_title("\n".join(title))
        _draw(ax, points.loc[panel.index])
    axes[-1].set_xlabel(_LABEL)
    return figure


def panel(ax: Axes, rows: pd.DataFrame) -> None:
    """Draw the bars of one case and their legend on the given axes."""
    _draw(ax, BREAKDOWN.points(rows))
    ax.set_xlabel(_LABEL)
    legend_below(ax, [_entries()])


def _entries() -> list[Artist]:
    whole = Line2D(
        [], [], color=_WHOLE, marker="|", markersize=11, markeredgewidth=2, linestyle="none", label=_OF_WHOLE
    )
    return [*(Patch(color=PART_COLORS[part], label=part) for part in PARTS), whole]


def _draw(ax: Axes, points: pd.DataFrame) -> None:
    """Draw one bar per line, from the top, with the whole time as a mark, and the sum of the parts beside the bar.

    If the sum differs from the whole time by more than MOST_APART, the text has both. A missing value leaves a gap.
    """
    lines = in_order(points["line"])
    values = points.groupby(["line", "curve"])["value"].agg(BREAKDOWN.combine).unstack()
    values = values.reindex(index=lines, columns=list(PARTS))
    wholes = points.groupby("line")["time_ms"].agg(BREAKDOWN.combine).reindex(lines).astype("float64")
    left = values[PARTS[0]] * 0
    for part in PARTS:
        length = values[part].where(values[part].notna() | left.isna(), 0.0)  # a forward has no backward
        ax.barh(range(len(lines)), length, left=left, height=0.74, color=PART_COLORS[part], label=part)
        left = left + length
    ax.vlines(wholes, [at - 0.46 for at in range(len(lines))], [at + 0.46 for at in range(len(lines))], color=_WHOLE)
    for place, (total, whole) in enumerate(zip(left, wholes, strict=True)):
        if pd.notna(total):
            is_apart = abs(total - whole) > MOST_APART * whole
            ax.annotate(
                f"{human(total)} ≠ {human(whole)}" if is_apart else human(total),
                (max(total, whole), place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=NOTE_SIZE,
                color=BAD if is_apart else "#222222",
            )
    ax.set_yticks(range(len(lines)), [shortened(line, 32) for line in lines], fontsize=NOTE_SIZE)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    end = (max(float(left.max()), float(wholes[left.notna()].max())) or 1.0) * _TOTAL_ROOM
    ticks = [float(tick) for tick in MaxNLocator(5).tick_values(0, end) if tick <= end]
    ax.set_xlim(0, end)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
