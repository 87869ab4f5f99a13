"""Draw the parity error of every job in one small figure, with one row of dots for each backend."""

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moebench.report.plots.kinds import MOST_TICKS_ALONG_X, PARITY, edge_text, limits, round_ticks, set_ticks, unit
from moebench.report.plots.look import BAD, CROSS, NOTE_SIZE, sheet, shortened, style
from moebench.results.labels import backend_labels, in_order
from moebench.results.record import Status

_ROW_IN, _AROUND_IN = 0.24, 0.75


def page_figure(rows: pd.DataFrame) -> Figure:
    """Return the figure of all rows. An error outside the axis is drawn at its edge."""
    points = PARITY.points(rows.assign(line=backend_labels(rows)))
    backends = in_order(points["backend"])
    is_wrong = points["status"] == Status.mismatch
    entries: list[Artist] = [Line2D([], [], color=BAD, linewidth=1.6, label="budget")]
    if is_wrong.any():
        entries.append(Line2D([], [], label="mismatch", **CROSS))
    figure, body = sheet(points, PARITY, (), [entries], _ROW_IN * len(backends) + _AROUND_IN)
    ax = body.subplots()
    bottom, top = limits(points, PARITY)
    ax.set_xscale("log")
    ax.set_xlim(bottom, top)
    ax.axvline(1.0, color=BAD, linewidth=1.6, label="budget")
    ax.axvspan(1.0, top, color=BAD, alpha=0.06, linewidth=0)
    shown = points["value"].clip(bottom * (top / bottom) ** 0.01, top / (top / bottom) ** 0.01)
    for place, backend in enumerate(backends):
        here = (points["backend"] == backend) & shown.notna()
        good, wrong = shown[here & ~is_wrong], shown[here & is_wrong]
        color, marker = style(backend)
        if len(good):  # matplotlib's layout would count an empty line, at the origin
            ax.plot(good, [place] * len(good), marker, color=color, alpha=0.45, markersize=6.5, label=backend)
        if len(wrong):
            ax.plot(wrong, [place] * len(wrong), **CROSS, label="mismatch", clip_on=False)
        for exact, at in zip(points["value"][here], shown[here], strict=True):
            if exact != at:
                ax.annotate(
                    edge_text(exact), (at, place), (9, 0), textcoords="offset points", va="center", fontsize=NOTE_SIZE
                )
    set_ticks(ax.xaxis, round_ticks(bottom, top, most=MOST_TICKS_ALONG_X), "{:g}".format)
    ax.set_yticks(range(len(backends)), [shortened(name, 32) for name in backends], fontsize=NOTE_SIZE)
    ax.set_ylim(len(backends) - 0.5, -0.5)
    ax.set_xlabel(f"{unit(points, PARITY)}: one mark for each job")
    return figure
