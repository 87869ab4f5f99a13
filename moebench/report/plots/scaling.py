"""Draw throughput per rank against the EP size, with equal tokens per rank.

The figure shows how much throughput expert parallelism costs. A flat line is perfect, because twice as many ranks then
do twice the work in the same time.
"""

import pandas as pd
from matplotlib.figure import Figure

from moebench.report.plots import lines
from moebench.report.plots.kinds import SCALING, set_ticks, tokens_text
from moebench.report.plots.look import line_legends, sheet
from moebench.results.labels import backend_labels, panel_title

_PANEL = ("mode", "routing", "rank_load", "num_tokens")


def on_lines(family: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a workload that are on a line.

    A row is on a line if its backend has two or more EP sizes in the row's panel. EP size 1 needs no dispatcher, so a
    row at EP size 1 is the first point of several lines: one line for each dispatcher of its backend.
    """
    alone, spread = family[family["ep_size"] == 1], family[family["ep_size"] > 1]
    begun = alone.drop(columns="dispatcher").merge(spread[["backend", "dispatcher"]].drop_duplicates(), on="backend")
    rows = pd.concat([begun, spread], ignore_index=True)
    rows["line"] = backend_labels(rows)
    num_sizes = rows.groupby([*_PANEL, "line"])["ep_size"].transform("nunique")
    return rows[(num_sizes > 1) & (rows["num_tokens"] > 0)]


def family_figure(rows: pd.DataFrame) -> Figure:
    """Return a figure of values against the EP size.

    The figure has one panel per mode, routing, load of the ranks and number of tokens.
    """
    points = SCALING.points(rows).assign(place=lambda points: points["ep_size"].astype("float64"))
    drawn = points.dropna(subset="value")
    panels = sorted(set(zip(*(drawn[name] for name in _PANEL), strict=True)))
    on_axes = ("tokens", "mode")
    figure, body = sheet(rows, SCALING, on_axes, line_legends(points, SCALING, joined=True), _body_in(rows, panels))
    axes = body.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for ax, key in zip(axes, panels, strict=True):
        mode, routing, load, count = key
        here = points[(points[list(_PANEL)] == list(key)).all(axis=1)]
        ax.set_title(panel_title(drawn, f"{mode}, {tokens_text(count)} tokens per rank", routing, load))
        lines.draw_values(ax, here, SCALING)
    sizes = sorted(set(drawn["ep_size"]))
    axes[-1].set_xscale("log", base=2)
    set_ticks(axes[-1].xaxis, sizes, str)
    axes[-1].set_xlabel("EP size: ranks that share the experts")
    return figure


def _body_in(rows: pd.DataFrame, panels: list[tuple[object, ...]]) -> float:
    return lines.panel_in(rows) * len(panels) + 0.3
