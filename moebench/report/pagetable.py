"""Make the tables of a report: all rows, the extreme rows with commands that measure them again, and the time spent.

The frames `rows` in this module are sorted by `labels.in_case_order`. They also have the columns `label` (the backend
with its dispatcher), `shape` (the model's name, or its shape), `fastest` (whether the row is the fastest of its case),
`close` (whether it is too close to the fastest to call) and `heading` (the case in words).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd

from moebench.machine.units import size
from moebench.report.reproduce import Reproducer
from moebench.report.tables.cells import Row, graph_times, half_interval, human, marks, milliseconds, mismatch
from moebench.results.folder import rows_of
from moebench.results.labels import describe, in_order
from moebench.results.record import GOOD, Status

_NUM_EXTREMES = 6
_PARTS = ("setup", "ceilings", "parity", "timing")  # the parts of a job; results have the seconds of each part
#: Parts of a case that have their own column if they vary, with the title of the column. All other parts share one
#: column.
_OWN_COLUMNS = {"experts": "model", "tokens": "tokens", "mode": "mode"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, its sort key, and whether it is a number."""

    text: str
    key: str | float
    is_number: bool = False


@dataclass(frozen=True)
class Line:
    """A row of the table: the values that filters match, and its cells."""

    backend: str
    model: str
    tokens: str
    mode: str
    routing: str
    status: str
    case_id: str
    is_fastest: bool
    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, row: Row, cells: tuple[Cell, ...]) -> "Line":
        """Return the line of a row of results."""
        names = (row["label"], row["shape"], str(row["num_tokens"]), row["mode"], row["routing"])
        return cls(*names, row["status"], row["case_id"], bool(row["fastest"]), cells)


@dataclass(frozen=True)
class Table:
    """The titles and lines of a table. `choices` has the values that the page offers for each filter."""

    titles: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def choices(self) -> dict[str, list[str]]:
        names = ("backend", "model", "tokens", "mode", "routing", "status")
        found = {name: list(dict.fromkeys(getattr(line, name) for line in self.lines)) for name in names}
        found["backend"] = in_order(found["backend"])
        found["tokens"] = sorted(found["tokens"], key=int)
        return found


@dataclass(frozen=True)
class Extreme:
    """A row to look at.

    `figure` says what is extreme, and `detail` says why the job failed; it is empty for a job that did not fail.
    `command` measures the row again; it is None if no sweep has the case.
    """

    case: str
    backend: str
    figure: str
    detail: str
    command: str | None


@dataclass(frozen=True)
class Spent:
    """The seconds that some jobs took together, and the seconds of the longest job.

    `shares` has the share of each part of these jobs in the time of the whole run.
    """

    who: str
    num_jobs: int
    seconds: float
    longest_s: float
    shares: dict[str, float]


MISSING = Cell("", math.inf, True)  # sorts last


def number(column: str, form: Callable[[Any], str]) -> Callable[[Row], Cell]:
    """Return a function that makes a cell of a row's value in `column`."""

    def cell(row: Row) -> Cell:
        value: Any = row[column]
        return MISSING if pd.isna(value) else Cell(form(value), float(value), True)

    return cell


def _interval(row: Row) -> Cell:
    share = (row["time_ms_high"] - row["time_ms_low"]) / row["time_ms"]
    return MISSING if math.isnan(share) else Cell(half_interval(row), share, True)


def _time(row: Row) -> Cell:
    if pd.isna(row["time_ms"]):
        return MISSING
    signs = marks(row) + "!" * bool(len(row["flags"]))
    return Cell(f"{signs} {milliseconds(row['time_ms'])}".strip(), row["time_ms"], True)


def _status(row: Row) -> Cell:
    return Cell(row["status"], row["status"])


#: For each column: its title, the column of results that it needs, and the function that makes a cell. A column is left
#: out if no row has the value that it needs.
_MEASURED: tuple[tuple[str, str, Callable[[Row], Cell]], ...] = (
    ("status", "other_status", _status),
    ("ms", "time_ms", _time),
    ("±", "time_ms", _interval),
    ("× fastest", "times_fastest", number("times_fastest", "{:.2f}".format)),
    ("graph ms", "shown_graph_ms", number("shown_graph_ms", milliseconds)),
    ("GPU busy, ms", "busy_ms", number("busy_ms", milliseconds)),
    ("tokens/s", "tokens_per_s", number("tokens_per_s", human)),
    ("TFLOP/s", "tflops", number("tflops", human)),
    ("of roofline", "roofline_fraction", number("roofline_fraction", "{:.0%}".format)),
    ("peak memory", "peak_memory_bytes", number("peak_memory_bytes", size)),
    ("saved", "saved_memory_bytes", number("saved_memory_bytes", size)),
    ("error", "parity_worst", number("parity_worst", "{:.2g}".format)),
    ("dispatch", "dispatch_ms", number("dispatch_ms", milliseconds)),
    ("compute", "compute_ms", number("compute_ms", milliseconds)),
    ("combine", "combine_ms", number("combine_ms", milliseconds)),
    ("backward", "backward_ms", number("backward_ms", milliseconds)),
)


def results_table(rows: pd.DataFrame) -> Table:
    """Return a table with one line per row: the parts of the case that vary, the backend, and the measurements."""
    rows = _beside_the_fastest(rows)
    titles, cells_of = case_columns(rows)
    measured = [(title, cell) for title, column, cell in _MEASURED if rows[column].notna().any()]
    lines = [
        Line.of(row, (*cells, _text(row["label"]), *(cell(row) for _, cell in measured)))
        for row, cells in zip(rows_of(rows), cells_of, strict=True)
    ]
    return Table((*titles, "backend", *(title for title, _ in measured)), tuple(lines))


def _beside_the_fastest(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the time divided by the fastest time of the case, and the time as a CUDA graph.

    Add also the status, if any row is not ok.
    """
    best_ms = rows.groupby(["run_id", "case_id"])["time_ms"].transform("min")
    status = rows["status"] if rows["status"].ne(Status.ok).any() else None
    return rows.assign(times_fastest=rows["time_ms"] / best_ms, shown_graph_ms=graph_times(rows), other_status=status)


def case_columns(rows: pd.DataFrame) -> tuple[tuple[str, ...], "pd.Series[Any]"]:
    """Return the titles of the columns that say in words what varies between cases, and the cells of each row."""
    parts = describe(rows).varying
    columns = {title: parts[name] for name, title in _OWN_COLUMNS.items() if name in parts}
    settings = [texts for name, texts in parts.items() if name not in _OWN_COLUMNS]
    if settings:
        columns["setting"] = [", ".join(filter(None, some)) for some in zip(*settings, strict=True)]
    text = cache(_text)  # cells with the same text are the same
    cells = [tuple(map(text, row)) for row in zip(*columns.values(), strict=True)] or [()] * len(rows)
    return tuple(columns), pd.Series(cells, index=rows.index, dtype=object)


def _text(text: str) -> Cell:
    return Cell(text, float(text), True) if text.isdecimal() else Cell(text, text)


def extremes(rows: pd.DataFrame, reproducer: Reproducer) -> dict[str, list[Extreme]]:
    """Return three lists by their titles: the rows that failed, the slowest rows and the least accurate rows."""
    failed = rows[~rows["status"].isin(GOOD)]
    slowest = rows.dropna(subset="time_ms").nlargest(_NUM_EXTREMES, "time_ms")
    best_ms = rows.groupby(["run_id", "case_id"])["time_ms"].transform("min")
    slowest = slowest.assign(times=slowest["time_ms"] / best_ms[slowest.index])
    passed = rows[rows["status"] == Status.ok].dropna(subset="parity_worst")
    least_accurate = passed.nlargest(_NUM_EXTREMES, "parity_worst")

    def listed(some: pd.DataFrame, figure: Callable[[Row], str], detail: Callable[[Row], str]) -> list[Extreme]:
        return [
            Extreme(row["heading"], row["label"], figure(row), detail(row), reproducer.command(row))
            for row in rows_of(some)
        ]

    return {
        "Failed": listed(failed, _failure, lambda row: row["detail"]),
        "Slowest": listed(slowest, _slowness, lambda row: ""),
        "Least accurate": listed(
            least_accurate,
            lambda row: f"{row['parity_worst']:.2g} of the budget" + _tensor(row),
            lambda row: "",
        ),
    }


def _slowness(row: Row) -> str:
    beside = f", {row['times']:.3g} times as long as the fastest backend of its case" if row["times"] > 1 else ""
    return f"{milliseconds(row['time_ms'])} ms{beside}"


def _tensor(row: Row) -> str:
    return "" if pd.isna(row["parity_worst_tensor"]) else f", in {row['parity_worst_tensor']}"


def _failure(row: Row) -> str:
    return " in ".join(filter(None, mismatch(row))) if row["status"] == Status.mismatch else row["status"]


def time_spent(rows: pd.DataFrame) -> list[Spent]:
    """Return the time of all jobs, and then the time of each backend, the longest first.

    A job without `job_s` counts as 0 s.
    """
    parts = pd.DataFrame({part: rows[f"{part}_s"].fillna(0.0) for part in _PARTS})
    parts["rest"] = (rows["job_s"].fillna(0.0) - parts.sum(axis=1)).clip(lower=0)
    total_s = float(rows["job_s"].sum()) or 1.0

    seconds = rows["job_s"].fillna(0.0)

    def spent(who: str, some: pd.Index) -> Spent:
        shares = {str(part): float(share) for part, share in (parts.loc[some].sum() / total_s).items()}
        return Spent(who, len(some), float(seconds[some].sum()), float(seconds[some].max()), shares)

    by_backend = [spent(str(label), some.index) for label, some in rows.groupby("label")]
    return [spent("all", rows.index), *sorted(by_backend, key=lambda one: -one.seconds)]
