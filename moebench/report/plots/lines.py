"""Draw values as lines against tokens, and draw the cases that are not on a line in an overview."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from statistics import fmean
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moebench.report.plots.kinds import (
    CEILINGS,
    MOST_TICKS,
    MOST_TICKS_ALONG_X,
    RATES,
    RATIO,
    Metric,
    edge_text,
    limits,
    round_ticks,
    set_ticks,
    ticks_of,
    tokens_text,
    unit,
)
from moebench.report.plots.look import (
    BAD,
    CEILING_LOOKS,
    CROSS,
    LEADING_IN,
    NOTE_SIZE,
    legend_below,
    line_legends,
    line_look,
    names_of_lines,
    sheet,
)
from moebench.results.labels import describe, in_order, panel_title
from moebench.results.record import Status

_PANEL_IN, _CROWDED_PANEL_IN, _CROWD = 2.45, 3.8, 6  # a panel's height, also if it has more lines than a crowd
_SEPARATOR, _MARK_SIZE = "#BBBBBB", 6.5
_LABEL_SHARE = 0.095  # the share of the token axis that a label of four characters and a gap take
_MARK_IN, _CASE_GAP_IN = 0.16, 0.13  # in an overview: height of a line, and gap between cases


def case_in(num_lines: int) -> float:
    """Return the approximate height in inches of a case with `num_lines` backends in an overview."""
    return max(2 * NOTE_SIZE * LEADING_IN, num_lines * _MARK_IN) + _CASE_GAP_IN


def on_lines(family: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows of a workload family are on a line.

    A row is on a line if its backend has two or more token counts in the row's panel.
    """
    counts = family["num_tokens"].where(family["num_tokens"] > 0)  # a logarithmic axis cannot show 0
    num_counts = counts.groupby([family[name] for name in ("mode", "routing", "rank_load", "line")]).transform(
        "nunique"
    )
    return counts.notna() & (num_counts > 1)


_PANEL = ("mode", "routing", "rank_load")


def family_figure(rows: pd.DataFrame, metric: Metric) -> Figure:
    """Return a figure of values against tokens, with one panel per mode, routing and load of the ranks."""
    points = _points(rows, metric)
    drawn = points.dropna(subset="value")
    panels = sorted(set(zip(*(drawn[name] for name in _PANEL), strict=True)))
    legends = line_legends(points, metric, joined=True)
    figure, body = sheet(rows, metric, ("tokens", "mode"), legends, panel_in(drawn) * len(panels) + 0.3)
    axes = body.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    of_panel = points.groupby(list(_PANEL)).indices
    for ax, place in zip(axes, panels, strict=True):
        ax.set_title(panel_title(drawn, *place))
        draw_values(ax, points.iloc[of_panel[place]], metric)
    _token_axis(axes[-1], drawn)
    return figure


def _points(rows: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Return the points of a metric at their number of tokens, with the columns that a panel and its legend need."""
    points = metric.points(rows).assign(place=rows["num_tokens"].astype("float64"))
    return points[[name for name in _OF_A_PANEL if name in points]]


def panel(ax: Axes, rows: pd.DataFrame, metric: Metric) -> None:
    """Draw the values of one panel against tokens on the given axes, with the legend of the values."""
    points = _points(rows[rows["num_tokens"] > 0], metric)
    draw_values(ax, points, metric)
    _token_axis(ax, points.dropna(subset="value"))
    legend_below(ax, line_legends(points, metric, joined=True))


def panel_in(rows: pd.DataFrame) -> float:
    """Return the height in inches of a panel that can show all lines of `rows`."""
    return _PANEL_IN if rows["line"].nunique() <= _CROWD else _CROWDED_PANEL_IN


def draw_values(ax: Axes, points: pd.DataFrame, metric: Metric) -> None:
    """Draw the values of every line at the positions in the column `place`, and the axis of values."""
    _draw(ax, points, metric, upright=True)
    ax.set_ylabel(unit(points, metric))
    if metric in RATES:
        _draw_ceilings(ax, points)
        _tflops_axis(ax, points)


def _draw_ceilings(ax: Axes, points: pd.DataFrame) -> None:
    """Draw the ceilings that the same run measured. If the backends' ceilings at a place differ, draw the median."""
    for name, look in CEILING_LOOKS.items():
        at = points.groupby("place")[name].median().dropna()
        ax.plot(at.index.to_numpy(dtype="float64"), at, label=name, **look)


def _token_axis(ax: Axes, drawn: pd.DataFrame) -> None:
    counts = spaced(sorted(set(drawn["place"])))
    ax.set_xscale("log", base=2)
    set_ticks(ax.xaxis, counts, tokens_text)
    ax.set_xlabel("tokens per rank" if (drawn["ep_size"] > 1).any() else "tokens")


def spaced(counts: Sequence[float]) -> list[float]:
    """Return the counts that can have a label on a logarithmic axis without overlap, always with the first and last."""
    apart = math.log(counts[-1] / counts[0]) * _LABEL_SHARE if counts else 0.0
    kept: list[float] = []
    for count in counts:
        if not kept or math.log(count / kept[-1]) >= apart:
            kept.append(count)
    if kept and kept[-1] != counts[-1]:
        kept[len(kept) - 1 if len(kept) > 1 else 1 :] = [counts[-1]]
    return kept


def page_figure(rows: pd.DataFrame, metric: Metric) -> Figure:
    """Return a figure of the cases that are not on a line, with one row of the figure per case.

    The height of a row depends on the number of backends of its case.
    """
    points = metric.points(rows)
    labels = dict(zip(rows["case"], describe(rows).labels, strict=True))
    texts: list[str] = []
    edges = [0.0]  # between cases, in inches from the top
    for case, some in points.groupby("case", sort=False):
        lines = in_order(some["line"])
        texts.append("\n".join(wrap(labels[case], 26)) or "all")
        text_in = (texts[-1].count("\n") + 1) * NOTE_SIZE * LEADING_IN
        edges.append(edges[-1] + max(text_in, len(lines) * _MARK_IN) + _CASE_GAP_IN)
        places = {line: fmean(edges[-2:]) + (at - (len(lines) - 1) / 2) * _MARK_IN for at, line in enumerate(lines)}
        points.loc[points["case"] == case, "place"] = some["line"].map(places)

    figure, body = sheet(rows, metric, (), line_legends(points, metric, joined=False), edges[-1] + 0.7)
    ax = body.subplots()
    _draw(ax, points, metric, upright=False)
    ax.set_yticks([fmean(pair) for pair in pairwise(edges)], texts, fontsize=NOTE_SIZE)
    ax.set_ylim(edges[-1], 0)
    ax.grid(visible=False, axis="y")
    ax.hlines(edges[1:-1], 0, 1, transform=ax.get_yaxis_transform(), color=_SEPARATOR, linewidth=0.8, zorder=0)
    ax.set_xlabel(unit(rows, metric))
    return figure


def _draw(ax: Axes, points: pd.DataFrame, metric: Metric, *, upright: bool) -> None:
    """Draw the values of every line at their places. The axis of values is y if `upright` is true, else x.

    Values outside the axis are drawn at its edge.
    """
    bottom, top = limits(points, metric, with_ceilings=upright)
    value_axis = ax.yaxis if upright else ax.xaxis
    (ax.set_yscale if upright else ax.set_xscale)("log", base=metric.base)
    (ax.set_ylim if upright else ax.set_xlim)(bottom, top)
    most = MOST_TICKS if upright else MOST_TICKS_ALONG_X
    set_ticks(value_axis, ticks_of(metric, bottom, top, most), metric.tick)
    if metric.budget is not None:
        (ax.axhline if upright else ax.axvline)(metric.budget, color=BAD, linewidth=1.6, label="budget")
        (ax.axhspan if upright else ax.axvspan)(metric.budget, top, color=BAD, alpha=0.06, linewidth=0)
    backends = in_order(points["backend"])
    curves = list(points["curve"].unique())
    points = points[[*_OF_A_LINE]].assign(wrong=points["status"] == Status.mismatch)
    names = names_of_lines(points)
    drawn = points.groupby(["line", "curve", "place"]).agg(
        value=("value", metric.combine),
        low=("low", "min"),
        high=("high", "max"),
        converged=("converged", "min"),
        wrong=("wrong", "max"),
    )
    numbers = drawn[["value", "low", "high"]].astype("float64").to_numpy(na_value=math.nan)
    values = _Values(
        drawn.index.get_level_values("place").to_numpy(dtype="float64"),
        numbers[:, 0],
        numbers[:, 1],
        numbers[:, 2],
        drawn["converged"].eq(False).fillna(False).to_numpy(dtype=bool),
        drawn["wrong"].to_numpy(dtype=bool),
    )
    of_line = drawn.groupby(["line", "curve"], sort=False).indices
    for line, curve in product(in_order(points["line"]), curves):
        at = values.at(of_line.get((line, curve), []))
        if not np.isnan(at.value).all():
            backend, dispatcher = names[line]
            above = backends.index(backend) / max(1, len(backends) - 1)
            look = line_look(backend, dispatcher, secondary=curve in metric.curves[1:], above=above)
            _draw_line(ax, at, metric, {**look, "label": f"{line} {curve}"}, (bottom, top), upright)


#: The columns of points from which a line is drawn.
_OF_A_LINE = ("line", "backend", "dispatcher", "curve", "place", "value", "low", "high", "converged")
#: The columns of points from which a panel against tokens is drawn.
_OF_A_PANEL = (*_PANEL, *_OF_A_LINE, "ep_size", "gpu", "status", "tflops", "tokens_per_s", *CEILINGS)


@dataclass(frozen=True)
class _Values:
    """The values of a line, with one entry for each place."""

    place: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    unconverged: np.ndarray
    wrong: np.ndarray

    def at(self, entries: Any) -> "_Values":
        return _Values(*(some[entries] for some in vars(self).values()))


def _draw_line(
    ax: Axes, at: _Values, metric: Metric, look: dict[str, Any], ends: tuple[float, float], upright: bool
) -> None:
    """Draw one line. `ends` are the limits of the axis of values."""

    def put(places: np.ndarray, values: np.ndarray, **how: Any) -> None:
        if len(values):  # matplotlib's layout would count an empty line, at the origin
            ax.plot(*((places, values) if upright else (values, places)), **how)

    if not upright:
        look = {**look, "linestyle": "none", "markersize": _MARK_SIZE}  # so that no mark covers another
    bottom, top = ends
    drawable, is_there = (at.value >= bottom) & (at.value <= top), ~np.isnan(at.value)
    put(at.place, np.where(drawable, at.value, math.nan), **look)
    if np.isnan(at.low).all():
        pass  # most values have no interval, and an area of no points takes as long to draw as a line
    elif upright:
        ax.fill_between(at.place, at.low, at.high, color=look["color"], alpha=0.25, linewidth=0)
    else:
        ax.hlines(at.place, at.low, at.high, color=look["color"], linewidth=1.5)

    plain = {
        "color": look["color"],
        "linestyle": "none",
        "marker": look["marker"],
        "markersize": look["markersize"],
        "zorder": look["zorder"],
    }
    shown = at.value.clip(bottom * (top / bottom) ** 0.03, top / (top / bottom) ** 0.03)
    is_outside = ~drawable & is_there
    put(at.place[is_outside], shown[is_outside], **plain)
    for place, value, exact in zip(at.place[is_outside], shown[is_outside], at.value[is_outside], strict=True):
        if metric is RATIO:
            break  # many backends may lie there, and the axis says how far it reaches
        where = (place, value) if upright else (value, place)
        ax.annotate(edge_text(exact), where, (9, 0), textcoords="offset points", va="center", fontsize=NOTE_SIZE)
    if metric in RATES:
        is_wide = at.unconverged & is_there
        put(at.place[is_wide], shown[is_wide], **plain, markerfacecolor="white", label="not converged")
    if metric.budget is not None:
        put(at.place[at.wrong], shown[at.wrong], **CROSS, label="mismatch", clip_on=False, zorder=4)


def _tflops_axis(ax: Axes, points: pd.DataFrame) -> None:
    """Draw a second axis, in TFLOP/s, on the right. It is exact: all tokens of a panel have the same useful work."""
    measured = points.dropna(subset="tflops")
    if measured.empty:
        return
    ratio = float(measured["tflops"].iloc[0] / measured["tokens_per_s"].iloc[0])
    scale: Any = (lambda tokens: tokens * ratio, lambda tflops: tflops / ratio)
    right = ax.secondary_yaxis("right", functions=scale)
    bottom, top = ax.get_ylim()
    set_ticks(right.yaxis, round_ticks(bottom * ratio, top * ratio), "{:g}".format)
    right.set_ylabel("TFLOP/s")
