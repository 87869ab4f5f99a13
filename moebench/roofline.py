"""Achieved TFLOP/s against arithmetic intensity, under the ceilings that the run measured. No torch here."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from moebench.case import UNGATED
from moebench.labels import in_order
from moebench.look import line_legends, line_look, sheet
from moebench.metrics import ROOFLINE, limits, round_ticks, unit

_PANEL_IN = 3.0
_CEILING: Any = {
    "color": "#222222",
    "linewidth": 1.6,
    "linestyle": (0, (4, 2)),
    "label": "measured ceiling",
    "zorder": 1,
}
_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def least_bytes(rows: pd.DataFrame) -> "pd.Series[float]":
    """Bytes per rank that every implementation has to move, were its caches perfect, in the case's dtype.

    Forward: the weights of a rank's experts once, tokens in and out. Train: weights read twice and their gradients
    written; tokens and the output's gradient in, the output and the tokens' gradient out. An expert that no token can
    choose, since there are fewer choices than experts, is not read.
    """
    num_tokens = rows["num_tokens"].astype("float64")
    choices = num_tokens * rows["n_activated_experts"] * rows["ep_size"]
    experts = np.minimum(rows["n_routed_experts"], choices) / rows["ep_size"]
    matrices = rows["expert_activation"].isin(UNGATED).map({True: 2, False: 3})
    weights = experts * matrices * rows["dim"] * rows["moe_inter_dim"]
    train = rows["mode"].eq("train")
    numbers = weights * train.map({True: 3, False: 1}) + num_tokens * rows["dim"] * train.map({True: 4, False: 2})
    num_bytes: pd.Series[float] = numbers * rows["dtype"].map(_DTYPE_BYTES).astype("float64")
    return num_bytes


def with_intensity(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with `intensity`, useful FLOP per byte of `least_bytes`, and `ceiling_tflops`, null where not measured."""
    flops = rows["tflops"] * rows["time_ms"] * 1e9
    return rows.assign(intensity=flops / least_bytes(rows), ceiling_tflops=rows["tflops"] / rows["roofline_fraction"])


def page_figure(rows: pd.DataFrame) -> Figure:
    """A panel for each mode and dtype; a mark for each row, a line at the ceilings."""
    points = with_intensity(ROOFLINE.points(rows))
    drawn = points.dropna(subset="value")
    panels = sorted(set(zip(drawn["mode"], drawn["dtype"], strict=True)))
    several = drawn["dtype"].nunique() > 1
    legends = line_legends(points, ROOFLINE, joined=False)
    legends.append([_ceiling_entry(bool(drawn["ceiling_tflops"].notna().any()))])
    figure, body = sheet(rows, ROOFLINE, ("mode",), legends, _PANEL_IN * len(panels) + 0.3)
    axes = body.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for ax, (mode, dtype) in zip(axes, panels, strict=True):
        ax.set_title(f"{mode}, {dtype}" if several else mode)
        draw(ax, drawn[(drawn["mode"] == mode) & (drawn["dtype"] == dtype)])
        ax.set_ylabel(unit(rows, ROOFLINE))
    body.align_ylabels(axes)
    axes[-1].set_xscale("log")
    low, high = drawn["intensity"].min() / 1.6, drawn["intensity"].max() * 1.6
    axes[-1].set_xlim(low, high)
    ticks = round_ticks(low, high, 10)
    axes[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[-1].xaxis.set_minor_locator(NullLocator())
    axes[-1].set_xlabel("FLOP per byte that has to move")
    return figure


def _ceiling_entry(measured: bool) -> Artist:
    if measured:
        return Line2D([], [], **_CEILING)
    return Line2D([], [], linestyle="none", label="no ceiling: this run measured none")


def draw(ax: Axes, points: pd.DataFrame) -> None:
    """The rows of one mode and dtype; points have value, low, high, intensity and ceiling_tflops."""
    ceiling = points.dropna(subset="ceiling_tflops").sort_values("intensity")
    values = pd.concat([points, ceiling.assign(value=ceiling["ceiling_tflops"])]) if len(ceiling) else points
    bottom, top = limits(values, ROOFLINE)
    ax.set_yscale("log")
    ax.set_ylim(bottom, top)
    ticks = round_ticks(bottom, top, 10)
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.yaxis.set_minor_locator(NullLocator())
    for line in in_order(points["line"]):
        rows = points[points["line"] == line]
        look: dict[str, Any] = line_look(*rows[["backend", "dispatcher"]].iloc[0])
        ax.plot(rows["intensity"], rows["value"], **{**look, "linestyle": "none"}, label=line)
    if len(ceiling):
        ax.plot(ceiling["intensity"], ceiling["ceiling_tflops"], **_CEILING)
