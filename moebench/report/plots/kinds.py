"""Define the kinds of figures: which values of a frame each kind shows, and the logarithmic axis of the values."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
from matplotlib.axis import Axis
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from moebench.machine.units import size
from moebench.results.labels import is_decode
from moebench.results.record import Status

PARTS = ("dispatch", "compute", "combine", "backward")  # the parts of a pass under expert parallelism, in order
#: The upper bounds of a rate: the name of each bound in a figure, and the column with its time.
CEILINGS = {"grouped GEMMs only": "grouped_ms", "roofline": "roofline_ms"}
#: The most labels that stay readable on an axis. Long labels such as "128 MiB" need more room on a horizontal axis.
MOST_TICKS, MOST_TICKS_ALONG_X = 6, 4
#: Factors of the ticks within each power of 10. The first of these choices that gives few enough ticks is taken. The
#: last choice is for axes that are too short for the other choices.
_FACTORS = ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))


@dataclass(frozen=True)
class Kind:
    """A kind of figure, and the values that it shows."""

    name: str
    title: str
    unit: str  # the label of the values' axis; {per} is GPU or process
    points: Callable[[pd.DataFrame], pd.DataFrame]  # adds the columns curve and value; a null value leaves a gap
    combine: str  # how values of several seeds or runs at one place become one
    curves: tuple[str, ...] = ()  # the names of the curves in the legend


@dataclass(frozen=True, kw_only=True)
class Metric(Kind):
    """A kind of figure with values along a logarithmic axis.

    Its points also have the columns low and high, the ends of the 95% confidence interval. The lines of all curves
    except the first look less prominent.
    """

    base: int  # the base of the logarithmic axis
    tick: Callable[[float], str]
    budget: float | None = None  # the largest value that passes
    window: tuple[float, float] = (sys.float_info.min, sys.float_info.max)  # a value outside is drawn at the edge
    least_span: float = 8.0  # the least factor between the ends of the axis
    ticks: tuple[float, ...] = ()  # the numbers that may stand on the axis; any round numbers if it is empty


def _points_of_throughput(rows: pd.DataFrame) -> pd.DataFrame:
    value, time = rows["tokens_per_s"].where(_is_ok(rows) & (rows["tokens_per_s"] > 0)), rows["time_ms"]
    low, high = value * time / rows["time_ms_high"], value * time / rows["time_ms_low"]
    ceilings = {name: value * time / rows[column] for name, column in CEILINGS.items()}
    return rows.assign(curve="tokens/s", value=value, low=low, high=high, **ceilings)


def _points_of_memory(rows: pd.DataFrame) -> pd.DataFrame:
    curves = {"peak": "peak_memory_bytes", "saved for backward": "saved_memory_bytes"}
    values = {curve: rows[column].astype("float64").where(_is_ok(rows)) for curve, column in curves.items()}
    return pd.concat([rows.assign(curve=curve, value=values[curve], low=math.nan, high=math.nan) for curve in curves])


def with_fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the column `fastest_ms`: the lowest time of any backend on the row's case in the row's run.

    It is null for a case with fewer than two times.
    """
    times = rows["time_ms"].where(_is_ok(rows)).astype("float64")
    case = times.groupby([rows[name] for name in ("case_id", "device", "gpu", "run_id")], dropna=False)
    return rows.assign(fastest_ms=case.transform("min").where(case.transform("count") > 1))


def _points_of_ratio(rows: pd.DataFrame) -> pd.DataFrame:
    """The frame must come from `with_fastest`. No interval reaches below 0.97, so that the axis begins near 1."""
    values = {
        name: rows[column].astype("float64") / rows["fastest_ms"]
        for name, column in (("value", "time_ms"), ("low", "time_ms_low"), ("high", "time_ms_high"))
    }
    shown = {name: some.where(_is_ok(rows)).clip(lower=0.97) for name, some in values.items()}
    return rows.assign(curve="time / fastest", **shown)


def _points_of_decoding(rows: pd.DataFrame) -> pd.DataFrame:
    ok = _is_ok(rows) & is_decode(rows)
    curves = {"CUDA graph": "graph_time_ms", "call": "time_ms"}
    values = {curve: rows[column].astype("float64").where(ok) for curve, column in curves.items()}
    return pd.concat([rows.assign(curve=curve, value=values[curve], low=math.nan, high=math.nan) for curve in curves])


def _points_of_parity(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(curve="error", value=rows["parity_worst"], low=math.nan, high=math.nan)


def _points_of_breakdown(rows: pd.DataFrame) -> pd.DataFrame:
    values = {part: rows[f"{part}_ms"].where(_is_ok(rows) & (rows["ep_size"] > 1)) for part in PARTS}
    return pd.concat([rows.assign(curve=part, value=values[part]) for part in PARTS])


def _points_of_replay(rows: pd.DataFrame) -> pd.DataFrame:
    values = {part: rows[f"step_{part}_ms"].where(_is_ok(rows)) for part in ("p50", "p99")}
    return pd.concat([rows.assign(curve=part, value=value) for part, value in values.items()])


def _points_of_roofline(rows: pd.DataFrame) -> pd.DataFrame:
    value = rows["tflops"].where(_is_ok(rows) & (rows["tflops"] > 0))
    return rows.assign(curve="TFLOP/s", value=value, low=math.nan, high=math.nan)


def _is_ok(rows: pd.DataFrame) -> "pd.Series[bool]":
    return rows["status"].eq(Status.ok).astype("bool")


def tokens_text(count: float) -> str:
    """Return a token count as text: 1024 as 1K, 1536 as 1.5K. A count that is not a multiple of 512 stays a number."""
    for power, suffix in ((20, "M"), (10, "K")):
        if count >= 2**power and count % 2 ** (power - 1) == 0:
            return f"{count / 2**power:g}{suffix}"
    return f"{count:g}"


THROUGHPUT = Metric(
    "throughput",
    "Throughput",
    "tokens/s per {per}",
    _points_of_throughput,
    combine="median",
    base=10,
    tick=EngFormatter(sep=""),
)
SCALING = replace(THROUGHPUT, name="scaling", title="Scaling")
RATES = (THROUGHPUT, SCALING)
#: Times above three times the fastest are drawn at the edge, so that a difference of 5% can be seen.
RATIO = Metric(
    *("ratio", "Time against the fastest, up to 3×", "time / fastest", _points_of_ratio),
    combine="median",
    base=10,
    tick="{:g}×".format,
    window=(0.9, 3.0),
    least_span=1.25,
    ticks=(1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5, 3.0),
)
DECODE = Metric(
    *("decode", "Decoding", "ms", _points_of_decoding),
    combine="median",
    base=10,
    tick="{:g}".format,
    curves=("CUDA graph", "call"),
)
MEMORY = Metric(
    *("memory", "Memory", "memory per {per}", _points_of_memory),
    combine="max",
    base=2,
    tick=lambda num_bytes: size(num_bytes, "g"),
    curves=("peak", "saved for backward"),
)
PARITY = Metric(
    *("parity", "Parity", "error / budget", _points_of_parity),
    combine="max",
    base=10,
    tick="{:g}".format,
    budget=1.0,
    window=(1e-4, 1e6),
)
ROOFLINE = Metric(
    *("roofline", "Roofline", "TFLOP/s per {per}", _points_of_roofline), combine="median", base=10, tick="{:g}".format
)
BREAKDOWN = Kind("breakdown", "Breakdown", "ms", _points_of_breakdown, combine="median", curves=PARTS)

REPLAY = Kind("replay", "Replay", "ms", _points_of_replay, combine="median", curves=("p50", "p99"))


def unit(rows: pd.DataFrame, metric: Kind) -> str:
    """Return the unit of the values: per GPU, or per process if no row has a GPU."""
    return metric.unit.format(per="process" if rows["gpu"].isna().all() else "GPU")


def limits(points: pd.DataFrame, metric: Metric, with_ceilings: bool = False) -> tuple[float, float]:
    """Return the limits of a logarithmic axis for all values and the budget, with a margin.

    The limits are at least a factor of `metric.least_span` apart.
    """
    ceilings = CEILINGS if with_ceilings and metric in RATES else ()
    numbers = points[["value", "low", "high", *ceilings]].to_numpy(dtype="float64")
    least, most = metric.window
    values = [float(number) for number in numbers[(numbers >= least) & (numbers <= most)]]
    if metric.budget is not None:
        values += [metric.budget / 3, metric.budget * 3]
    if metric.ticks and (numbers > most).any():
        values.append(most)  # so that the edge says "more than this"
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    spare = max((high / low) ** 0.07, math.sqrt(metric.least_span * low / high))
    edge = (
        high / low * metric.least_span
    ) ** 0.1  # more room beyond the last number, for values that are drawn at the edge
    low, high = low / spare, high * spare
    return low / edge if (numbers < least).any() else low, high * edge if (numbers > most).any() else high


def edge_text(exact: float) -> str:
    """Return the text beside a value that is drawn at the edge of the axis."""
    return "∞" if exact == math.inf else f"{exact:.0e}" if exact else "0"


def ticks_of(metric: Metric, low: float, high: float, most: int = MOST_TICKS) -> list[float]:
    """Return the numbers on the axis of a metric: round numbers, or those of `metric.ticks` that have room."""
    if not metric.ticks:
        return round_ticks(low, high, metric.base, most)
    apart, found = math.log(high / low) / (most + 3), list[float]()
    for tick in metric.ticks:
        if low <= tick <= high and (not found or math.log(tick / found[-1]) > apart):
            found.append(tick)
    return found


def round_ticks(low: float, high: float, base: int = 10, most: int = MOST_TICKS) -> list[float]:
    """Return between two and `most` round numbers from `low` to `high`. `high` must be at least 2.5 times `low`."""
    ticks: list[float] = []
    for factors in _FACTORS if base == 10 else ((1.0,),):
        found = LogLocator(base, factors, numticks=most).tick_values(low, high)
        ticks = [float(tick) for tick in found if low <= tick <= high]
        if factors == (1.0,):  # matplotlib 3.10 leaves out no powers on some long axes
            ticks = ticks[:: math.ceil(len(ticks) / most) or 1]
        if 2 <= len(ticks) <= most:
            break
    return ticks


def set_ticks(axis: Axis, ticks: Sequence[float], text: Callable[[float], str]) -> None:
    """Put labels only at the given ticks of a logarithmic axis."""
    axis.set_ticks(ticks, [text(tick) for tick in ticks])
    axis.set_minor_locator(NullLocator())
