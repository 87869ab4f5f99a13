"""Frame -> matplotlib figures, readable at 400 px width: throughput, memory and parity against tokens. No torch here.

A workload family (all of a case but its tokens, mode, routing and seed, on one machine) with two token counts or more
has a figure of its own, with a panel for each mode and routing; the rest is gathered in an overview, so that nothing
measured is invisible. Only figures, no pyplot: importing this changes nothing for who imports it.
"""

import hashlib
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from types import MappingProxyType
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from moebench.frame import backend_labels, describe, in_case_order, in_order, machine, write_atomically
from moebench.record import Status

#: Colour (Okabe and Ito's and Tol's, told apart by the colour-blind) and marker of each known backend.
BACKEND_STYLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "loop": ("#5A5A5A", "o"),
        "torch_mm": ("#0072B2", "s"),
        "gmm": ("#E69F00", "^"),
        "te": ("#009E73", "D"),
        "te_fp8_current": ("#CC79A7", "v"),
        "te_fp8_delayed": ("#882255", ">"),
        "te_fp8_block": ("#D55E00", "P"),
        "torch_mm_mxfp8": ("#56B4E9", "<"),
        "triton": ("#332288", "p"),
    }
)
_OTHER_COLORS = ("#999933", "#AA4499", "#661100", "#44AA99", "#6699CC", "#B8860B")
_OTHER_MARKERS = ("h", "d", "8", "H", "*")
#: Dashes and fill of a dispatcher, since colour and marker are its backend's.
_DISPATCHER_LOOKS: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {"local": ("-", "full"), "allgather": ("-", "full"), "alltoall": ((0, (6, 1.5)), "left")}
)
_OTHER_DISPATCHER_LOOK = ((0, (1.5, 1)), "bottom")
_SAVED_DASHES = (0, (3, 2))
_BAD, _INK = "#C00000", "#222222"
_CROSS: Mapping[str, Any] = MappingProxyType(
    {"marker": "x", "color": _BAD, "markersize": 11, "markeredgewidth": 2.6, "linestyle": "none"}
)


_WIDTH_IN, _PANEL_IN, _MARGIN_IN = 6.4, 2.45, 0.12
_TITLE_SIZE, _TEXT_SIZE, _NOTE_SIZE = 13.5, 12.0, 11.0
_LEADING_IN = 1.35 / 72  # a line's height, per point of its font size
_CHARACTER_IN = 0.57 / 72  # a character's mean width, likewise
_RC: Any = {  # of Any, since matplotlib's own type of it lists every key
    "font.family": "DejaVu Sans",
    "font.size": _TEXT_SIZE,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "xtick.major.size": 4,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "savefig.dpi": 200,
    "svg.hashsalt": "moebench",
}
_CASES_A_PAGE = 24
_MOST_TICKS = 6

Named = list[tuple[str, Figure]]

#: A line joins cases that agree in these; they differ in tokens, mode, routing, seed and backend.
_FAMILY = (
    *("model", "n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim", "dtype", "expert_activation"),
    *("expert_bias", "activation_alpha", "activation_limit", "swiglu_limit", "apply_router_weight_after_down"),
    *("masked_share", "ep_size", "device", "gpu"),
)


@dataclass(frozen=True)
class _Metric:
    """What one kind of figure shows."""

    name: str
    title: str
    unit: str  # of the values, for the axis; {per} is GPU or process
    points: Callable[[pd.DataFrame], pd.DataFrame]  # the rows with curve, value, low, high; null leaves a gap
    combine: str  # values of several seeds or runs at one place
    base: int  # of the logarithmic axis
    tick: Callable[[float], str]
    budget: float | None = None  # the most that passes
    window: tuple[float, float] = (sys.float_info.min, sys.float_info.max)  # beyond it a value stands at the edge
    curves: tuple[str, ...] = ()  # to tell apart in the legend; all but the first are dashed


def style(backend: str) -> tuple[str, str]:
    """Colour and marker of a backend, the same everywhere; those of an unknown one follow from its name alone."""
    if backend in BACKEND_STYLES:
        return BACKEND_STYLES[backend]
    number = int.from_bytes(hashlib.sha256(backend.encode()).digest()[:4], "big")
    return _OTHER_COLORS[number % len(_OTHER_COLORS)], _OTHER_MARKERS[number // 97 % len(_OTHER_MARKERS)]


def throughput(frame: pd.DataFrame) -> Named:
    """Tokens/s per GPU against tokens, TFLOP/s on the right, the 95% interval as a band. Only rows with status ok."""
    return _figures(frame, _THROUGHPUT)


def memory(frame: pd.DataFrame) -> Named:
    """Peak memory against tokens, and dashed what forward leaves saved for backward. Only rows with status ok."""
    return _figures(frame, _MEMORY)


def parity(frame: pd.DataFrame) -> Named:
    """The worst error over its budget against tokens, with a line at the budget; a mismatch has a cross."""
    return _figures(frame, _PARITY)


def write_plots(frame: pd.DataFrame, folder: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write every figure of `frame` into `folder`, made if missing. The same frame gives the same SVG, to the byte."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for slug, figure in (*throughput(frame), *memory(frame), *parity(frame)):
        for kind in formats:
            image = io.BytesIO()
            with matplotlib.rc_context(_RC):
                figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else None)
            paths.append(folder / f"{slug}.{kind}")
            write_atomically(paths[-1], image.getvalue())
    return paths


# The metrics


def _points_of_throughput(rows: pd.DataFrame) -> pd.DataFrame:
    value, time = rows["tokens_per_s"].where(_is_ok(rows) & (rows["tokens_per_s"] > 0)), rows["time_ms"]
    low, high = value * time / rows["time_ms_high"], value * time / rows["time_ms_low"]
    return rows.assign(curve="tokens/s", value=value, low=low, high=high)


def _points_of_memory(rows: pd.DataFrame) -> pd.DataFrame:
    curves = {"peak": "peak_memory_bytes", "saved for backward": "saved_memory_bytes"}
    values = {curve: rows[column].astype("float64").where(_is_ok(rows)) for curve, column in curves.items()}
    return pd.concat([rows.assign(curve=curve, value=values[curve], low=math.nan, high=math.nan) for curve in curves])


def _points_of_parity(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(curve="error", value=rows["parity_worst"], low=math.nan, high=math.nan)


def _is_ok(rows: pd.DataFrame) -> "pd.Series[bool]":
    return rows["status"].eq(Status.ok).astype("bool")


def _short(value: float) -> str:
    """A decimal suffix: 20K, 1.5M."""
    for power, suffix in ((9, "G"), (6, "M"), (3, "K")):
        if value >= 10**power:
            return f"{value / 10**power:g}{suffix}"
    return f"{value:g}"


def _bytes(value: float) -> str:
    for power, suffix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**power:
            return f"{value / 2**power:g} {suffix}"
    return f"{value:g} B"


def _tokens(count: float) -> str:
    """1024 as 1K, as tokens are counted; what is not a multiple of 512 stays as it is."""
    for power, suffix in ((20, "M"), (10, "K")):
        if count >= 2**power and count % 2 ** (power - 1) == 0:
            return f"{count / 2**power:g}{suffix}"
    return f"{count:g}"


_THROUGHPUT = _Metric(
    "throughput", "Throughput", "tokens/s per {per}", _points_of_throughput, combine="median", base=10, tick=_short
)
_MEMORY = _Metric(
    *("memory", "Memory", "memory per {per}", _points_of_memory),
    combine="max",
    base=2,
    tick=_bytes,
    curves=("peak", "saved for backward"),
)
_PARITY = _Metric(
    *("parity", "Parity", "error / budget", _points_of_parity),
    combine="max",
    base=10,
    tick="{:g}".format,
    budget=1.0,
    window=(1e-4, 1e6),
)


# Figures


def _figures(frame: pd.DataFrame, metric: _Metric) -> Named:
    rows = in_case_order(frame)
    rows["line"] = backend_labels(rows)
    named: Named = []
    gathered = [rows.iloc[:0]]
    with matplotlib.rc_context(_RC):
        for _, family in rows.groupby(list(_FAMILY), dropna=False, sort=False):
            some = family[family["num_tokens"] > 0]  # a logarithmic axis has no place for 0
            is_line = some["num_tokens"].nunique() > 1
            gathered.append(family.drop(some.index) if is_line else family)
            if is_line and metric.points(some)["value"].notna().any():
                named.append((_slug(metric, some), _line_figure(some, metric)))
        pages = _pages(pd.concat(gathered), metric)
        named += [(f"{metric.name}-overview", _overview_figure(page, metric)) for page in pages]
    return _distinct(named)


def _pages(rows: pd.DataFrame, metric: _Metric) -> list[pd.DataFrame]:
    """Rows of as many cases as fit one overview, if they have something to show."""
    cases = list(dict.fromkeys(rows["case_id"]))
    parts = [cases[start : start + _CASES_A_PAGE] for start in range(0, len(cases), _CASES_A_PAGE)]
    pages = [rows[rows["case_id"].isin(part)] for part in parts]
    return [page for page in pages if metric.points(page)["value"].notna().any()]


def _slug(metric: _Metric, rows: pd.DataFrame) -> str:
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


def _line_figure(rows: pd.DataFrame, metric: _Metric) -> Figure:
    """Values against tokens, a panel for each mode and routing."""
    points = metric.points(rows).assign(place=lambda points: points["num_tokens"].astype("float64"))
    drawn = points.dropna(subset="value")
    panels = sorted(set(zip(drawn["mode"], drawn["routing"], strict=True)))
    figure, body = _sheet(rows, metric, ("tokens", "mode"), True, _PANEL_IN * len(panels) + 0.3)
    axes = body.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for ax, (mode, routing) in zip(axes, panels, strict=True):
        here = points[(points["mode"] == mode) & (points["routing"] == routing)]
        ax.set_title(mode if drawn["routing"].nunique() == 1 else f"{mode}, {routing}")
        _draw(ax, here, metric, upright=True)
        ax.set_ylabel(_unit(rows, metric))
        if metric is _THROUGHPUT:
            _tflops_axis(ax, here)
    counts = sorted(set(drawn["place"]))
    step = math.ceil(len(counts) / 9)
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xticks(counts[::step], [_tokens(count) for count in counts[::step]])
    axes[-1].set_xticks([], minor=True)
    axes[-1].set_xlabel("tokens per rank" if (rows["ep_size"] > 1).any() else "tokens")
    return figure


def _overview_figure(rows: pd.DataFrame, metric: _Metric) -> Figure:
    """Values of cases that are on no line, a row each."""
    points = metric.points(rows)
    labels = dict(zip(rows["case_id"], describe(rows).labels, strict=True))
    cases = {case: place for place, case in enumerate(labels)}
    lines = in_order(points["line"])
    dodge = {line: (number - (len(lines) - 1) / 2) * 0.6 / len(lines) for number, line in enumerate(lines)}
    points["place"] = points["case_id"].map(cases).astype("float64") + points["line"].map(dodge)

    texts = ["\n".join(wrap(labels[case], 26)) or "all" for case in cases]
    tall = max(text.count("\n") + 1 for text in texts)
    row_in = max(tall * _NOTE_SIZE * _LEADING_IN + 0.08, 0.16 * len(lines))
    figure, body = _sheet(rows, metric, (), False, row_in * len(cases) + 0.7)
    ax = body.subplots()
    _draw(ax, points, metric, upright=False)
    ax.set_yticks(list(cases.values()), texts, fontsize=_NOTE_SIZE)
    ax.set_ylim(len(cases) - 0.5, -0.5)
    ax.set_xlabel(_unit(rows, metric))
    return figure


def _draw(ax: Axes, points: pd.DataFrame, metric: _Metric, *, upright: bool) -> None:
    """Every line's values at their places; upright: values along y. What is off the axis stands at its edge."""
    bottom, top = _limits(points, metric)
    ticks = _ticks(bottom, top, metric.base)
    value_axis = ax.yaxis if upright else ax.xaxis
    (ax.set_yscale if upright else ax.set_xscale)("log", base=metric.base)
    (ax.set_ylim if upright else ax.set_xlim)(bottom, top)
    value_axis.set_ticks(ticks, [metric.tick(tick) for tick in ticks])
    value_axis.set_minor_locator(NullLocator())
    if metric.budget is not None:
        (ax.axhline if upright else ax.axvline)(metric.budget, color=_BAD, linewidth=1.6, gid="budget")
        (ax.axhspan if upright else ax.axvspan)(metric.budget, top, color=_BAD, alpha=0.06, linewidth=0)
    for line in in_order(points["line"]):
        for curve, rows in points[points["line"] == line].groupby("curve", sort=False):
            look = _look(rows["backend"].iloc[0], rows["dispatcher"].iloc[0], dashed=curve in metric.curves[1:])
            if rows["value"].notna().any():
                _draw_line(ax, rows, metric, {**look, "gid": f"{line}/{curve}"}, upright)


def _draw_line(ax: Axes, rows: pd.DataFrame, metric: _Metric, look: dict[str, Any], upright: bool) -> None:
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
        ax.annotate(text, where, (9, 0), textcoords="offset points", va="center", fontsize=_NOTE_SIZE)
    if metric is _THROUGHPUT:
        wide = shown[at["converged"].eq(False).fillna(False).to_numpy(dtype=bool) & shown.notna()]
        put(wide.index, wide, **plain, markerfacecolor="white", gid="not converged")
    if metric.budget is not None:
        wrong = shown[shown.index.isin(rows.loc[rows["status"] == Status.mismatch, "place"])]
        put(wrong.index, wrong, **_CROSS, gid="mismatch", clip_on=False, zorder=4)


def _look(backend: str, dispatcher: str, *, dashed: bool) -> dict[str, Any]:
    color, marker = style(backend)
    dashes, fill = _DISPATCHER_LOOKS.get(dispatcher, _OTHER_DISPATCHER_LOOK)
    look = {"color": color, "marker": marker, "linestyle": dashes, "fillstyle": fill}
    if dashed:
        return {**look, "linestyle": _SAVED_DASHES, "linewidth": 1.6, "markersize": 5, "markerfacecolor": "white"}
    size = 10 if marker in "P*" else 7  # thin markers
    return {**look, "markeredgecolor": "white", "markeredgewidth": 0.7, "markersize": size}


def _tflops_axis(ax: Axes, points: pd.DataFrame) -> None:
    """TFLOP/s on the right: exact, since useful work per token is one number in a panel."""
    measured = points.dropna(subset="tflops")
    if measured.empty:
        return
    ratio = float(measured["tflops"].iloc[0] / measured["tokens_per_s"].iloc[0])
    scale: Any = (lambda tokens: tokens * ratio, lambda tflops: tflops / ratio)
    right = ax.secondary_yaxis("right", functions=scale)
    bottom, top = ax.get_ylim()
    ticks = _ticks(bottom * ratio, top * ratio, 10)
    right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    right.yaxis.set_minor_locator(NullLocator())
    right.set_ylabel("TFLOP/s")


def _limits(points: pd.DataFrame, metric: _Metric) -> tuple[float, float]:
    """Of a logarithmic axis that holds every value and the budget, with a margin; a factor of 8 or more apart."""
    numbers = points[["value", "low", "high"]].to_numpy(dtype="float64")
    least, most = metric.window
    values = [float(number) for number in numbers[(numbers >= least) & (numbers <= most)]]
    if metric.budget is not None:
        values += [metric.budget / 3, metric.budget * 3]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    spare = max((high / low) ** 0.07, math.sqrt(8 * low / high))
    edge = (high / low * 8) ** 0.1  # beyond the last number, for what stands at the edge
    low, high = low / spare, high * spare
    return low / edge if (numbers < least).any() else low, high * edge if (numbers > most).any() else high


def _ticks(low: float, high: float, base: int) -> list[float]:
    """Round numbers between low and high, as many as stay readable."""
    first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    within: tuple[tuple[int, ...], ...] = ((1, 2, 5), (1, 3), (1,)) if base == 10 else ((1,),)
    patterns = [(1, factors) for factors in within] + [(step, (1,)) for step in range(2, last - first + 2)]
    ticks: list[float] = []
    for step, factors in patterns:
        powers = range(first // step * step, last + 1, step)
        ticks = [
            tick for power in powers for factor in factors if low <= (tick := factor * float(base) ** power) <= high
        ]
        if len(ticks) <= _MOST_TICKS:
            break
    return ticks


# The text around


def _unit(rows: pd.DataFrame, metric: _Metric) -> str:
    return metric.unit.format(per="process" if rows["gpu"].isna().all() else "GPU")


def _sheet(
    rows: pd.DataFrame, metric: _Metric, on_axes: tuple[str, ...], joined: bool, body_in: float
) -> tuple[Figure, SubFigure]:
    """A figure with its title, legend and notes, and between them a subfigure `body_in` inches high for axes."""
    head, notes = _head(rows, metric, on_axes), _fold(_undrawn(rows, metric), _NOTE_SIZE)
    entries = _legend_entries(metric.points(rows).dropna(subset="value"), metric, joined)
    longest = max(len(str(entry.get_label())) for entry in entries)
    columns = max(1, min(len(entries), int(_WIDTH_IN / (longest * _TEXT_SIZE * _CHARACTER_IN + 0.7))))
    legend_in = math.ceil(len(entries) / columns) * 0.25 + 0.1
    head_in = sum(size * _LEADING_IN for _, size, _ in head) + _MARGIN_IN
    foot_in = legend_in + len(notes) * _NOTE_SIZE * _LEADING_IN + _MARGIN_IN

    heights = [head_in, body_in, foot_in]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights)), layout="constrained")
    top, body, bottom = figure.subfigures(3, squeeze=False, height_ratios=heights)[:, 0]
    _write_lines(top, head, _MARGIN_IN / 2, head_in)
    _write_lines(bottom, [(note, _NOTE_SIZE, "normal") for note in notes], legend_in, foot_in)
    bottom.legend(handles=entries, loc="upper center", ncols=columns, borderaxespad=0, labelspacing=0.3)
    return figure, body


def _head(rows: pd.DataFrame, metric: _Metric, on_axes: tuple[str, ...]) -> list[tuple[str, float, str]]:
    """Lines that say what was measured where, with size and weight."""
    shared = {part: text for part, text in describe(rows).shared.items() if part not in on_axes}
    first = [shared.pop(part) for part in ("experts", "dtype", "activation") if part in shared]
    title = f"{metric.title}: {', '.join(first)}" if first else metric.title
    numbers = rows[["n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim"]].drop_duplicates()
    shape = [
        f"{experts} experts, top {top}, dim {dim}, inter {inter}" for experts, top, dim, inter in numbers.to_numpy()
    ]
    below = [", ".join([*(shape if len(shape) == 1 else ()), *shared.values()]), machine(rows)]
    return [
        *((line, _TITLE_SIZE, "bold") for line in _fold(title, _TITLE_SIZE * 1.08)),
        *((line, _NOTE_SIZE, "normal") for text in below for line in _fold(text, _NOTE_SIZE)),
    ]


def _write_lines(area: SubFigure, lines: list[tuple[str, float, str]], down_in: float, height_in: float) -> None:
    for text, size, weight in lines:
        where = (_MARGIN_IN / _WIDTH_IN, 1 - down_in / height_in)
        area.text(*where, text, fontsize=size, fontweight=weight, va="top", parse_math=False)
        down_in += size * _LEADING_IN


def _fold(text: str, size: float) -> list[str]:
    return wrap(text, int((_WIDTH_IN - 2 * _MARGIN_IN) / (size * _CHARACTER_IN)))


def _legend_entries(points: pd.DataFrame, metric: _Metric, joined: bool) -> list[Line2D]:
    def entry(label: str, **look: Any) -> Line2D:
        return Line2D([], [], label=label, **look)

    dot: dict[str, Any] = {"marker": "o", "linestyle": "none"}
    hollow: dict[str, Any] = {"markerfacecolor": "white", "markersize": 5}
    entries = []
    for line in in_order(points["line"]):
        row = points[points["line"] == line].iloc[0]
        name = line if len(line) <= 44 else f"{line[:21]}…{line[-22:]}"
        look = _look(row["backend"], row["dispatcher"], dashed=False)
        entries.append(entry(name, **look if joined else {**look, "linestyle": "none"}))
    if metric.curves and points["curve"].nunique() > 1:
        looks = ({}, {"linestyle": _SAVED_DASHES, "linewidth": 1.6}) if joined else (dot, {**dot, **hollow})
        entries += [entry(curve, color=_INK, **look) for curve, look in zip(metric.curves, looks, strict=True)]
    if metric is _THROUGHPUT and points["converged"].eq(False).any():
        entries.append(entry("not converged", color=_INK, **dot, **hollow))
    if metric.budget is not None:
        entries.append(entry("budget", color=_BAD, linewidth=1.6))
    if points["status"].eq(Status.mismatch).any():
        entries.append(entry("mismatch", **_CROSS))
    return entries


def _undrawn(rows: pd.DataFrame, metric: _Metric) -> str:
    """What was tried and has no value here, so that a gap explains itself."""
    missing = rows.drop(metric.points(rows).dropna(subset="value").index.unique())
    statuses = missing["status"].where(missing["status"] != Status.ok, "not measured")
    counts = Counter(zip(missing["line"], statuses, strict=True))
    texts = [f"{line} {status} ×{count}" for (line, status), count in sorted(counts.items())]
    return "Not drawn: " + ", ".join(texts) if texts else ""
