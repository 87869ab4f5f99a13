"""Draw achieved TFLOP/s against arithmetic intensity, with the ceilings that the run measured."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moebench.report.plots.kinds import MOST_TICKS_ALONG_X, ROOFLINE, limits, round_ticks, set_ticks, unit
from moebench.report.plots.look import legend_below, line_legends, line_look, sheet
from moebench.results.labels import in_order
from moebench.workload.backends import adapters_of
from moebench.workload.case import UNGATED

_PANEL_IN = 3.0
_ROOF: Any = {"marker": "_", "markersize": 15, "markeredgewidth": 2.0, "linestyle": "none"}
_SLOPE: Any = {"linestyle": (0, (4, 2)), "linewidth": 1.5}
_CEILINGS: Mapping[str, Any] = MappingProxyType(
    {
        "roof_tflops": {"label": "measured ceiling of the case", "color": "#222222", "zorder": 1, **_ROOF},
        "copy_tflops": {"label": "limit by memory copy speed", "color": "#888888", "zorder": 1, **_SLOPE},
    }
)
_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def least_bytes(rows: pd.DataFrame) -> "pd.Series[float]":
    """Return the bytes per rank that every implementation must move even with perfect caches, in the case's dtype.

    In mode forward, an implementation must read once the parameters of the experts that have tokens, read the rows of
    tokens that the mask keeps, and write all rows of the output. In mode train, it must also move all gradients; with
    adapters, parameters have none.
    moebench.measure.ceilings counts these bytes, and those of biases. A row does not say how many experts have tokens,
    so this function assumes the average number under uniform routing.
    """
    num_tokens = rows["num_tokens"].astype("float64")
    kept = num_tokens * (1 - rows["masked_share"])
    experts = rows["n_routed_experts"] / rows["ep_size"]
    idle_share = (1 - rows["n_activated_experts"] / rows["n_routed_experts"]) ** (kept * rows["ep_size"])
    with_tokens = experts * (1 - idle_share)
    matrices = rows["expert_activation"].isin(UNGATED).map({True: 2, False: 3})
    train = rows["mode"].eq("train").astype("int64")
    trained = train * rows["backend"].map(lambda name: adapters_of(str(name)) is None).astype("int64")
    parameters = (with_tokens + trained * experts) * matrices * rows["dim"] * rows["moe_inter_dim"]
    numbers = parameters + (1 + train) * (kept + num_tokens) * rows["dim"]
    num_bytes: pd.Series[float] = numbers * rows["dtype"].map(_DTYPE_BYTES).astype("float64")
    return num_bytes


def with_intensity(rows: pd.DataFrame) -> pd.DataFrame:
    """Return `rows` with `intensity`, the useful FLOP per byte of `least_bytes`, and the measured bounds in TFLOP/s.

    `roof_tflops` is the ceiling that was measured for the row's case. `copy_tflops` is the rate that the speed of a
    memory copy allows at the row's intensity. A value is null if its bound was not measured. `copy_tflops` is also null
    if caches may be warm, or if it is above every ceiling, because the bytes to move are then not the bound.
    """
    intensity = rows["tflops"] * rows["time_ms"] * 1e9 / least_bytes(rows)
    roof, copied = rows["tflops"] / rows["roofline_fraction"], intensity * rows["copy_gb_per_s"] / 1e3
    is_bound = rows["l2"].eq("cold").fillna(False) & (copied <= roof.max())
    return rows.assign(intensity=intensity, roof_tflops=roof, copy_tflops=copied.where(is_bound))


def page_figure(rows: pd.DataFrame) -> Figure:
    """Return a figure with one panel per mode and dtype, one mark per row, and the ceilings."""
    points = with_intensity(ROOFLINE.points(rows))
    drawn = points.dropna(subset="value")
    panels = sorted(set(zip(drawn["mode"], drawn["dtype"], strict=True)))
    several = drawn["dtype"].nunique() > 1
    legends = line_legends(points, ROOFLINE, joined=False)
    legends.append(_ceiling_entries(drawn))
    figure, body = sheet(rows, ROOFLINE, ("mode",), legends, _PANEL_IN * len(panels) + 0.3)
    axes = body.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for ax, (mode, dtype) in zip(axes, panels, strict=True):
        ax.set_title(f"{mode}, {dtype}" if several else mode)
        _draw(ax, drawn[(drawn["mode"] == mode) & (drawn["dtype"] == dtype)])
        ax.set_ylabel(unit(rows, ROOFLINE))
    _intensity_axis(axes[-1], drawn)
    return figure


def panel(ax: Axes, rows: pd.DataFrame) -> None:
    """Draw the rows of one mode and dtype on the given axes, with the legend of the rows."""
    points = with_intensity(ROOFLINE.points(rows))
    drawn = points.dropna(subset="value")
    _draw(ax, drawn)
    ax.set_ylabel(unit(rows, ROOFLINE))
    _intensity_axis(ax, drawn)
    legend_below(ax, [*line_legends(points, ROOFLINE, joined=False), _ceiling_entries(drawn)])


def _intensity_axis(ax: Axes, drawn: pd.DataFrame) -> None:
    low, high = drawn["intensity"].min() / 1.6, drawn["intensity"].max() * 1.6
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    set_ticks(ax.xaxis, round_ticks(low, high, most=MOST_TICKS_ALONG_X), "{:g}".format)
    ax.set_xlabel("FLOP per byte that must be moved")


def _ceiling_entries(drawn: pd.DataFrame) -> list[Artist]:
    measured = [look for column, look in _CEILINGS.items() if drawn[column].notna().any()]
    if measured:
        return [Line2D([], [], **look) for look in measured]
    return [Line2D([], [], linestyle="none", label="no ceilings measured")]


def _draw(ax: Axes, points: pd.DataFrame) -> None:
    """Draw one mark per row of one mode and dtype, and above the marks the measured ceilings."""
    bottom, top = limits(pd.concat([points, points.assign(value=points["roof_tflops"])]), ROOFLINE)
    ax.set_yscale("log")
    ax.set_ylim(bottom, top)
    set_ticks(ax.yaxis, round_ticks(bottom, top), ROOFLINE.tick)
    for line in in_order(points["line"]):
        rows = points[points["line"] == line]
        look: dict[str, Any] = line_look(*rows[["backend", "dispatcher"]].iloc[0])
        ax.plot(rows["intensity"], rows["value"], **{**look, "linestyle": "none"}, label=line)
    for column, look in _CEILINGS.items():
        some = points.dropna(subset=column).sort_values("intensity")
        if len(some):
            ax.plot(some["intensity"], some[column], **look)
