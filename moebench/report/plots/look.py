"""Define the look of figures: colour and marker of each backend, sizes, and the text around the axes."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from textwrap import wrap
from types import MappingProxyType
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox, ScaledTranslation

from moebench.report.plots.kinds import CEILINGS, RATES, Kind, Metric
from moebench.report.plots.settings import OURS
from moebench.results.labels import describe, in_order, machine
from moebench.results.record import Status

#: Colour and marker of each known backend. Most colours are Okabe and Ito's or Tol's, which colour-blind readers can
#: distinguish. A time that did not converge has an empty marker, so every marker must be one that can be filled.
#: Matplotlib has 15 such markers. A backend with adapters or with main gradients therefore shares its marker with its
#: engine, triton_fp8 shares its with its variants and with deep_gemm_fp8, and layers of other libraries (peers) share
#: theirs with backends that are in other figures.
BACKEND_STYLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "loop": ("#5A5A5A", "o"),
        "torch_mm": ("#0072B2", "s"),
        "gmm": ("#E69F00", "^"),
        "torch_mm_save_time": ("#66CCEE", "8"),
        "gmm_save_time": ("#A86F00", "H"),
        "te": ("#009E73", "D"),
        "te_fp8_current": ("#CC79A7", "v"),
        "te_fp8_delayed": ("#882255", ">"),
        "te_fp8_block": ("#D55E00", "P"),
        "te_fp8_current_cached": ("#7A4FC9", "d"),
        "te_fp8_block_cached": ("#8A5A00", "X"),
        "te_mxfp8": ("#8DB600", "*"),
        "torch_mm_mxfp8": ("#56B4E9", "<"),
        "triton": ("#000000", "p"),
        "triton_main_grad": ("#7F7F00", "p"),
        "triton_fp8": ("#C51B7D", "h"),
        "triton_fp8_e5m2": ("#4D9221", "h"),
        "triton_fp8_16bit_dw": ("#2C3E9E", "h"),
        "triton_fp8_rows": ("#1B9E9E", "h"),
        "deep_gemm_fp8": ("#5B3A29", "h"),
        "loop_lora": ("#A9A9A9", "o"),
        "torch_mm_lora": ("#6A5ACD", "s"),
        "triton_lora": ("#B22222", "p"),
        "peer_transformers": ("#B03060", "h"),
        "peer_automodel_torch_mm": ("#117733", "d"),
        "peer_automodel_te": ("#332288", "P"),
        "peer_sonicmoe": ("#DDAA33", "X"),
    }
)
_OTHER_COLORS = ("#999933", "#AA4499", "#661100", "#44AA99", "#6699CC", "#B8860B")
_OTHER_MARKERS = ("h", "d", "8", "H", "*")
#: Dashes, marker and scale of each dispatcher. The colour is the colour of the backend. Later dispatchers are drawn
#: over earlier dispatchers and are smaller, so that the earlier dispatchers still show.
_DISPATCHER_LOOKS: Mapping[str, tuple[Any, str, float]] = MappingProxyType(
    {
        "allgather": ("-", "o", 1.1),
        "alltoall": ((0, (4, 1.5)), "s", 0.85),
        "deepep": ((0, (1, 1)), "^", 0.75),
        "symm_mem": ((0, (3, 1, 1, 1)), "v", 0.65),
    }
)
_OTHER_DISPATCHER_LOOK = ((0, (6, 1.5, 1, 1.5)), "D", 0.7)
_SAVED_DASHES = (0, (3, 2))
_SECONDARY: Mapping[str, Any] = MappingProxyType({"linewidth": 1.3, "markersize": 5, "markerfacecolor": "white"})
BAD, _INK = "#C00000", "#222222"
CROSS: Mapping[str, Any] = MappingProxyType(
    {"marker": "x", "color": BAD, "markersize": 11, "markeredgewidth": 2.6, "linestyle": "none"}
)

#: The look of each of moebench.report.plots.kinds.CEILINGS. Ceilings are drawn below the lines of the backends.
CEILING_LOOKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        name: {"color": "#777777", "linewidth": 1.3, "linestyle": dashes, "zorder": 1.5}
        for name, dashes in zip(CEILINGS, ((0, (1, 1.5)), (0, (5, 2))), strict=True)
    }
)

_WIDTH_IN, PANEL_IN, _MARGIN_IN = 6.4, 2.45, 0.12
_TITLE_SIZE, _TEXT_SIZE, NOTE_SIZE = 13.5, OURS["font.size"], 11.0
LEADING_IN = 1.35 / 72  # a line's height, per point of its font size
_LABELS_IN = 0.6  # an axis's tick labels and its label
_ENTRY_IN = 0.25  # one line of a legend
_CHARACTER_IN = 0.57 / 72  # a character's mean width, per point of its font size


def style(backend: str) -> tuple[str, str]:
    """Return colour and marker of a backend, the same in every figure.

    A backend that has no colour here gets one that depends only on its name.
    """
    if backend in BACKEND_STYLES:
        return BACKEND_STYLES[backend]
    number = int.from_bytes(hashlib.sha256(backend.encode()).digest()[:4], "big")
    return _OTHER_COLORS[number % len(_OTHER_COLORS)], _OTHER_MARKERS[number // 97 % len(_OTHER_MARKERS)]


def line_look(backend: str, dispatcher: str, *, secondary: bool = False, above: float = 0.5) -> dict[str, Any]:
    """Return how to draw the line of a backend and dispatcher.

    `secondary` is true for all curves except the first. `above` is 0 for the backend that is drawn first and 1 for the
    backend that is drawn last. Earlier lines are broader, so that they show where a later line covers them.
    """
    color, marker = style(backend)
    look = {"color": color, **_stroke(dispatcher, marker, above)}
    if secondary:
        return {**look, **_SECONDARY, **({"linestyle": _SAVED_DASHES} if dispatcher == "local" else {})}
    return {**look, "markeredgecolor": "white", "markeredgewidth": 0.7}


def _stroke(dispatcher: str, marker: str, above: float = 0.5) -> dict[str, Any]:
    dashes, size = "-", 1.0
    if dispatcher != "local":
        dashes, marker, size = _DISPATCHER_LOOKS.get(dispatcher, _OTHER_DISPATCHER_LOOK)
    thin = 1.4 if marker in "P*X" else 1.0  # these markers look smaller than they are
    return {
        "linestyle": dashes,
        "marker": marker,
        "linewidth": (3.4 - 1.8 * above) * size,
        "markersize": (8.5 - 2.0 * above) * size * thin,
        "zorder": 3 - size / 2 + above / 100,
    }


def sheet(
    rows: pd.DataFrame, kind: Kind, on_axes: tuple[str, ...], legends: list[list[Artist]], body_in: float
) -> tuple[Figure, SubFigure]:
    """Return a figure with title, legends and notes, and the part of the figure for axes, `body_in` inches high."""
    head, notes = _head(rows, kind, on_axes), _fold(_undrawn(rows, kind), NOTE_SIZE)
    legends = [entries for entries in legends if entries]  # if no row has a value, no line needs a legend
    columns = [_columns(entries) for entries in legends]
    rows_of_entries = [math.ceil(len(entries) / some) for entries, some in zip(legends, columns, strict=True)]
    legend_in = sum(rows_of_entries) * _ENTRY_IN + 0.1
    head_in = sum(size * LEADING_IN for _, size, _ in head) + _MARGIN_IN
    foot_in = legend_in + len(notes) * NOTE_SIZE * LEADING_IN + _MARGIN_IN

    heights = [head_in, body_in, foot_in]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights)))
    figure.set_layout_engine("constrained", w_pad=_MARGIN_IN)
    top, body, bottom = figure.subfigures(3, squeeze=False, height_ratios=heights)[:, 0]
    _write_lines(top, head, _MARGIN_IN / 2, head_in)
    _write_lines(bottom, [(note, NOTE_SIZE, "normal") for note in notes], legend_in, foot_in)
    for number, entries in enumerate(legends):
        where = (0.5, 1 - sum(rows_of_entries[:number]) * _ENTRY_IN / foot_in)
        how: dict[str, Any] = {"ncols": columns[number], "borderaxespad": 0, "labelspacing": 0.3}
        bottom.legend(handles=entries, loc="upper center", bbox_to_anchor=where, **how)
    return figure, body


def _columns(entries: list[Artist]) -> int:
    """Return how many entries of a legend fit side by side."""
    longest = max(len(str(entry.get_label())) for entry in entries)
    return max(1, min(len(entries), int(_WIDTH_IN / (longest * _TEXT_SIZE * _CHARACTER_IN + 0.7))))


def _head(rows: pd.DataFrame, kind: Kind, on_axes: tuple[str, ...]) -> list[tuple[str, float, str]]:
    """Return the lines of the title, with size and weight. The title says what was measured on which machine."""
    shared = {part: text for part, text in describe(rows).shared.items() if part not in on_axes}
    first = [shared.pop(part) for part in ("experts", "dtype", "activation", "ep_size") if part in shared]
    title = f"{kind.title}: {', '.join(first)}" if first else kind.title
    numbers = rows[["n_routed_experts", "ep_size", "n_activated_experts", "dim", "moe_inter_dim"]].drop_duplicates()
    shape = [
        f"{experts} experts{f' on {ranks} ranks' * (ranks > 1)}, top {top}, dim {dim}, inter {inter}"
        for experts, ranks, top, dim, inter in numbers.to_numpy()
    ]
    below = [", ".join([*(shape if len(shape) == 1 else ()), *shared.values()]), machine(rows)]
    return [
        *((line, _TITLE_SIZE, "bold") for line in _fold(title, _TITLE_SIZE * 1.08)),
        *((line, NOTE_SIZE, "normal") for text in below for line in _fold(text, NOTE_SIZE)),
    ]


def _write_lines(area: SubFigure, lines: list[tuple[str, float, str]], down_in: float, height_in: float) -> None:
    for text, size, weight in lines:
        where = (_MARGIN_IN / _WIDTH_IN, 1 - down_in / height_in)
        area.text(*where, text, fontsize=size, fontweight=weight, va="top")
        down_in += size * LEADING_IN


def _fold(text: str, size: float) -> list[str]:
    return wrap(text, int((_WIDTH_IN - 2 * _MARGIN_IN) / (size * _CHARACTER_IN)))


#: The columns of points that a legend says something about. Points of a metric that is not a rate have no ceilings.
_OF_A_LEGEND = ("line", "backend", "dispatcher", "curve", "value", "converged", "status", *CEILINGS)


def line_legends(points: pd.DataFrame, metric: Metric, joined: bool) -> list[list[Artist]]:
    """Return the legends of lines.

    Without dispatchers, one legend has an entry per line. With dispatchers, one legend has the backends, and another
    legend has the dispatchers.
    """
    drawn = points[[name for name in _OF_A_LEGEND if name in points]].dropna(subset="value")
    if drawn["dispatcher"].eq("local").all():
        names = names_of_lines(drawn)
        looks = {line: line_look(*names[line]) for line in in_order(names)}
        return [[*_entries(looks, joined), *_other_entries(drawn, metric, joined)]]
    engines = {name: {"color": style(name)[0], "linewidth": 4.0} for name in in_order(drawn["backend"])}
    dispatchers = {name: {**_stroke(name, ""), "color": _INK} for name in sorted(set(drawn["dispatcher"]))}
    legends = [_entries(engines, joined=True), _entries(dispatchers, joined), _other_entries(drawn, metric, joined)]
    return [entries for entries in legends if entries]


def names_of_lines(points: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Return the backend and the dispatcher of each line."""
    columns = (points[name].tolist() for name in ("line", "backend", "dispatcher"))
    return {line: (backend, dispatcher) for line, backend, dispatcher in zip(*columns, strict=True)}


def legend_below(ax: Axes, legends: list[list[Artist]]) -> None:
    """Put a legend with all entries below the axes and their labels. The figure must have no other axes."""
    entries = [entry for entries in legends for entry in entries]
    how: dict[str, Any] = {"ncols": _columns(entries), "borderaxespad": 0, "labelspacing": 0.3}
    figure: Any = ax.get_figure(root=True)
    below = ax.transAxes + ScaledTranslation(0, -_LABELS_IN, figure.dpi_scale_trans)
    how |= {"bbox_to_anchor": (0.5, 0.0), "bbox_transform": below}
    ax.legend(handles=entries, loc="upper center", fontsize=NOTE_SIZE, **how)


def _entries(looks: Mapping[str, dict[str, Any]], joined: bool) -> list[Artist]:
    unjoined = {} if joined else {"linestyle": "none"}
    return [Line2D([], [], label=shortened(name), **{**look, **unjoined}) for name, look in looks.items()]


def _other_entries(points: pd.DataFrame, metric: Metric, joined: bool) -> list[Artist]:
    """Return the entries of a legend that are not backends: curves, not converged, ceilings, the budget, mismatches."""

    def entry(label: str, **look: Any) -> Artist:
        return Line2D([], [], label=label, **look)

    dot: dict[str, Any] = {"marker": "o", "linestyle": "none"}
    hollow: dict[str, Any] = {"markerfacecolor": "white", "markersize": 5}
    entries = []
    if metric.curves and points["curve"].nunique() > 1:
        dashed = {"linestyle": _SAVED_DASHES} if points["dispatcher"].eq("local").all() else {}
        looks = ({"marker": "o"}, {"marker": "o", **_SECONDARY, **dashed}) if joined else (dot, {**dot, **hollow})
        entries += [entry(curve, color=_INK, **look) for curve, look in zip(metric.curves, looks, strict=True)]
    if metric in RATES and points["converged"].eq(False).any():
        entries.append(entry("not converged", color=_INK, **dot, **hollow))
    if metric in RATES and joined:
        entries += [entry(name, **look) for name, look in CEILING_LOOKS.items() if points[name].notna().any()]
    if metric.budget is not None:
        entries.append(entry("budget", color=BAD, linewidth=1.6))
    if points["status"].eq(Status.mismatch).any():
        entries.append(entry("mismatch", **CROSS))
    return entries


def shortened(name: str, most: int = 44) -> str:
    """Return the name as a label in at most `most` characters. A longer name loses its middle.

    matplotlib leaves a label out of a legend if it begins with an underscore, so such a name gets a space before it.
    """
    half = most // 2
    name = f" {name}" if name.startswith("_") else name
    return name if len(name) <= most else f"{name[: half - 1]}…{name[-(most - half) :]}"


def _undrawn(rows: pd.DataFrame, kind: Kind) -> str:
    """Return a note that explains gaps: the lines and statuses of the rows that have no value."""
    has_value = kind.points(rows)["value"].notna()
    missing = rows[["line", "status"]].drop(has_value.index[has_value].unique())
    statuses = missing["status"].where(missing["status"] != Status.ok, "not measured")
    counts = Counter(zip(missing["line"], statuses, strict=True))
    texts = [f"{line} {status} ×{count}" for (line, status), count in sorted(counts.items())]
    return "Not drawn: " + ", ".join(texts) if texts else ""


def settle(figure: Figure) -> None:
    """Fix the layout of a figure, with rounded numbers. Call it with moebench's settings.

    The last bits of the numbers from matplotlib's layout solver vary from run to run, and would change ids in an SVG.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        part.bbox_relative.set_points(part.bbox_relative.get_points().round(5))
        part.align_ylabels()  # during the layout, each panel would lay out the labels of all panels
    for ax in figure.axes:
        ax.set_position(Bbox(ax.get_position().get_points().round(5)))
