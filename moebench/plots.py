"""Frame -> matplotlib figures, readable at 400 px width: throughput, memory and parity against tokens. No torch here.

A workload family (all of a case but its tokens, mode, routing and seed, on one machine) with two token counts or more
has a figure of its own, with a panel for each mode and routing; the rest is gathered in an overview, so that nothing
measured is invisible. Only figures, no pyplot: importing this changes nothing for who imports it.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moebench.frame import write_atomically
from moebench.labels import backend_labels, describe, in_case_order, in_order
from moebench.look import BAD, CROSS, LEADING_IN, NOTE_SIZE, PANEL_IN, RC, line_look, settle, sheet
from moebench.metrics import MEMORY, PARITY, THROUGHPUT, Metric, limits, round_ticks, tokens_text, unit
from moebench.record import Status

_CASES_A_PAGE = 24
_PREFIXES = tuple(f"{metric.name}-" for metric in (THROUGHPUT, MEMORY, PARITY))  # of every file that is written

Named = list[tuple[str, Figure]]

#: A line joins cases that agree in these; they differ in tokens, mode, routing, seed and backend.
_FAMILY = (
    *("model", "n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim", "dtype", "expert_activation"),
    *("expert_bias", "activation_alpha", "activation_limit", "swiglu_limit", "apply_router_weight_after_down"),
    *("masked_share", "ep_size", "device", "gpu"),
)


def throughput(frame: pd.DataFrame) -> Named:
    """Tokens/s per GPU against tokens, TFLOP/s on the right, the 95% interval as a band. Only rows with status ok."""
    return _figures(frame, THROUGHPUT)


def memory(frame: pd.DataFrame) -> Named:
    """Peak memory against tokens, and dashed what forward leaves saved for backward. Only rows with status ok."""
    return _figures(frame, MEMORY)


def parity(frame: pd.DataFrame) -> Named:
    """The worst error over its budget against tokens, with a line at the budget; a mismatch has a cross."""
    return _figures(frame, PARITY)


def write_plots(frame: pd.DataFrame, folder: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write every figure of `frame` into `folder`, made if missing, and remove plots there of what it no longer holds.

    The same frame gives the same SVG, to the byte.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    named = [*throughput(frame), *memory(frame), *parity(frame)]
    for slug, figure in named:
        settle(figure)
        for kind in formats:
            image = io.BytesIO()
            with matplotlib.rc_context(RC):
                figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else None)
            paths.append(folder / f"{slug}.{kind}")
            write_atomically(paths[-1], image.getvalue())
    _remove_all_but({slug for slug, _ in named}, folder)
    return paths


def _remove_all_but(slugs: set[str], folder: Path) -> None:
    """Remove the plots of other names, but no file that `write_plots` cannot have written."""
    for path in folder.iterdir():
        ours = path.suffix in (".png", ".svg") and path.stem.startswith(_PREFIXES) and path.is_file()
        if ours and path.stem not in slugs:
            path.unlink()


def _figures(frame: pd.DataFrame, metric: Metric) -> Named:
    rows = in_case_order(frame)
    rows["line"] = backend_labels(rows)
    rows["case"] = rows.groupby(["case_id", "device", "gpu", "run_id"], dropna=False, sort=False).ngroup()
    named: Named = []
    gathered = [rows.iloc[:0]]
    with matplotlib.rc_context(RC):
        for _, family in rows.groupby(list(_FAMILY), dropna=False, sort=False):
            some = family[family["num_tokens"] > 0]  # a logarithmic axis has no place for 0
            is_line = some["num_tokens"].nunique() > 1
            gathered.append(family.drop(some.index) if is_line else family)
            if is_line and metric.points(some)["value"].notna().any():
                named.append((_slug(metric, some), _line_figure(some, metric)))
        pages = _pages(pd.concat(gathered), metric)
        named += [(f"{metric.name}-overview", _overview_figure(page, metric)) for page in pages]
    return _distinct(named)


def _pages(rows: pd.DataFrame, metric: Metric) -> list[pd.DataFrame]:
    """Rows of as many cases as fit one overview, if they have something to show."""
    cases = list(dict.fromkeys(rows["case"]))
    parts = [cases[start : start + _CASES_A_PAGE] for start in range(0, len(cases), _CASES_A_PAGE)]
    pages = [rows[rows["case"].isin(part)] for part in parts]
    return [page for page in pages if metric.points(page)["value"].notna().any()]


def _slug(metric: Metric, rows: pd.DataFrame) -> str:
    words = f"{metric.name} {describe(rows).title('tokens', 'mode', 'routing', 'seed')}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


def _distinct(named: Named) -> Named:
    """Number the names that occur again, as on a second machine."""
    counts: Counter[str] = Counter()
    distinct = []
    for slug, figure in named:
        counts[slug] += 1
        distinct.append((slug if counts[slug] == 1 else f"{slug}-{counts[slug]}", figure))
    return distinct


def _line_figure(rows: pd.DataFrame, metric: Metric) -> Figure:
    """Values against tokens, a panel for each mode and routing."""
    points = metric.points(rows).assign(place=lambda points: points["num_tokens"].astype("float64"))
    drawn = points.dropna(subset="value")
    panels = sorted(set(zip(drawn["mode"], drawn["routing"], strict=True)))
    figure, body = sheet(rows, metric, ("tokens", "mode"), True, PANEL_IN * len(panels) + 0.3)
    axes = body.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for ax, (mode, routing) in zip(axes, panels, strict=True):
        here = points[(points["mode"] == mode) & (points["routing"] == routing)]
        ax.set_title(mode if drawn["routing"].nunique() == 1 else f"{mode}, {routing}")
        _draw(ax, here, metric, upright=True)
        ax.set_ylabel(unit(rows, metric))
        if metric is THROUGHPUT:
            _tflops_axis(ax, here)
    body.align_ylabels(axes)
    counts = sorted(set(drawn["place"]))
    step = math.ceil(len(counts) / 9)
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xticks(counts[::step], [tokens_text(count) for count in counts[::step]])
    axes[-1].set_xticks([], minor=True)
    axes[-1].set_xlabel("tokens per rank" if (rows["ep_size"] > 1).any() else "tokens")
    return figure


def _overview_figure(rows: pd.DataFrame, metric: Metric) -> Figure:
    """Values of cases that are on no line, a row each."""
    points = metric.points(rows)
    labels = dict(zip(rows["case"], describe(rows).labels, strict=True))
    cases = {case: place for place, case in enumerate(labels)}
    lines = in_order(points["line"])
    dodge = {line: (number - (len(lines) - 1) / 2) * 0.6 / len(lines) for number, line in enumerate(lines)}
    points["place"] = points["case"].map(cases).astype("float64") + points["line"].map(dodge)

    texts = ["\n".join(wrap(labels[case], 26)) or "all" for case in cases]
    tall = max(text.count("\n") + 1 for text in texts)
    row_in = max(tall * NOTE_SIZE * LEADING_IN + 0.08, 0.16 * len(lines))
    figure, body = sheet(rows, metric, (), False, row_in * len(cases) + 0.7)
    ax = body.subplots()
    _draw(ax, points, metric, upright=False)
    ax.set_yticks(list(cases.values()), texts, fontsize=NOTE_SIZE)
    ax.set_ylim(len(cases) - 0.5, -0.5)
    ax.set_xlabel(unit(rows, metric))
    return figure


def _draw(ax: Axes, points: pd.DataFrame, metric: Metric, *, upright: bool) -> None:
    """Every line's values at their places; upright: values along y. What is off the axis stands at its edge."""
    bottom, top = limits(points, metric)
    ticks = round_ticks(bottom, top, metric.base)
    value_axis = ax.yaxis if upright else ax.xaxis
    (ax.set_yscale if upright else ax.set_xscale)("log", base=metric.base)
    (ax.set_ylim if upright else ax.set_xlim)(bottom, top)
    value_axis.set_ticks(ticks, [metric.tick(tick) for tick in ticks])
    value_axis.set_minor_locator(NullLocator())
    if metric.budget is not None:
        (ax.axhline if upright else ax.axvline)(metric.budget, color=BAD, linewidth=1.6, label="budget")
        (ax.axhspan if upright else ax.axvspan)(metric.budget, top, color=BAD, alpha=0.06, linewidth=0)
    for line in in_order(points["line"]):
        for curve, rows in points[points["line"] == line].groupby("curve", sort=False):
            look = line_look(rows["backend"].iloc[0], rows["dispatcher"].iloc[0], dashed=curve in metric.curves[1:])
            if rows["value"].notna().any():
                _draw_line(ax, rows, metric, {**look, "label": f"{line} {curve}"}, upright)


def _draw_line(ax: Axes, rows: pd.DataFrame, metric: Metric, look: dict[str, Any], upright: bool) -> None:
    def put(places: Any, values: Any, **how: Any) -> None:
        if len(values):  # an empty line still takes part in the layout, at the origin
            ax.plot(*((places, values) if upright else (values, places)), **how)

    bottom, top = (ax.get_ylim if upright else ax.get_xlim)()
    at = rows.groupby("place").agg(
        value=("value", metric.combine), low=("low", "min"), high=("high", "max"), converged=("converged", "min")
    )
    places = at.index.to_numpy(dtype="float64")
    drawable = at["value"].between(bottom, top)
    put(places, at["value"].where(drawable), **look if upright else {**look, "linestyle": "none"})
    if upright:
        ax.fill_between(places, at["low"], at["high"], color=look["color"], alpha=0.25, linewidth=0)
    else:
        ax.hlines(places, at["low"], at["high"], color=look["color"], linewidth=1.5)

    plain = {"color": look["color"], "linestyle": "none", "marker": look["marker"]}
    shown = at["value"].clip(bottom * (top / bottom) ** 0.03, top / (top / bottom) ** 0.03)
    edge = shown[~drawable & shown.notna()]
    put(edge.index, edge, **plain)
    for place, value, exact in zip(edge.index, edge, at["value"][edge.index], strict=True):
        text = "∞" if exact == math.inf else f"{exact:.0e}" if exact else "0"
        where = (place, value) if upright else (value, place)
        ax.annotate(text, where, (9, 0), textcoords="offset points", va="center", fontsize=NOTE_SIZE)
    if metric is THROUGHPUT:
        wide = shown[at["converged"].eq(False).fillna(False).to_numpy(dtype=bool) & shown.notna()]
        put(wide.index, wide, **plain, markerfacecolor="white", label="not converged")
    if metric.budget is not None:
        wrong = shown[shown.index.isin(rows.loc[rows["status"] == Status.mismatch, "place"])]
        put(wrong.index, wrong, **CROSS, label="mismatch", clip_on=False, zorder=4)


def _tflops_axis(ax: Axes, points: pd.DataFrame) -> None:
    """TFLOP/s on the right: exact, since useful work per token is one number in a panel."""
    measured = points.dropna(subset="tflops")
    if measured.empty:
        return
    ratio = float(measured["tflops"].iloc[0] / measured["tokens_per_s"].iloc[0])
    scale: Any = (lambda tokens: tokens * ratio, lambda tflops: tflops / ratio)
    right = ax.secondary_yaxis("right", functions=scale)
    bottom, top = ax.get_ylim()
    ticks = round_ticks(bottom * ratio, top * ratio, 10)
    right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    right.yaxis.set_minor_locator(NullLocator())
    right.set_ylabel("TFLOP/s")
