"""Show results as a long table: one line for each backend of a case, the fastest first.

Where the terminal is wide enough, the case stands before its first line. Else it is a heading above its lines. Columns
that do not fit are left out or, if they are the parts of a forward pass, the GPU's own time or the time of a CUDA
graph, stand in a second line.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from textwrap import wrap
from typing import Any

import pandas as pd
from rich.text import Text

from moebench.report.tables.casecolumn import case_column
from moebench.report.tables.cells import (
    DIM,
    Row,
    half_interval,
    marks,
    memory,
    milliseconds,
    mismatch,
    part_milliseconds,
    percent,
    rate,
    status_text,
    style_of,
    times_text,
)
from moebench.results.folder import rows_of
from moebench.results.labels import Description, in_order
from moebench.results.record import Status
from moebench.workload.case import Case

Column = tuple[str, int, Callable[[Row], str]]  # title, width with the space before it, cell


def _part(title: str, name: str) -> Column:
    return title, 6, lambda row: part_milliseconds(row[name])


#: Every table has these columns.
SPEED: tuple[Column, ...] = (
    ("ms", 6, lambda row: milliseconds(row["time_ms"])),
    ("±", 5, half_interval),
    ("×fastest", 9, lambda row: times_text(row["times_fastest"])),
    ("memory", 9, lambda row: memory(row["peak_memory_bytes"])),
    ("err", 5, lambda row: f"{row['parity_worst']:.2f}"),
    ("", 1, lambda row: "!" if row["flagged"] else ""),
)
#: A table has these columns if a row has a value. Each needs the column of the frame that is named.
PARTS: tuple[tuple[str, Column], ...] = (
    ("graph_ms", _part("graph", "graph_ms")),
    ("busy_ms", _part("busy", "busy_ms")),
    ("dispatch_ms", _part("disp", "dispatch_ms")),
    ("compute_ms", _part("comp", "compute_ms")),
    ("combine_ms", _part("comb", "combine_ms")),
    ("skew_ms", _part("skew", "skew_ms")),
)
#: A table has these columns if a row has a value, and if the terminal is wide enough.
WIDE: tuple[tuple[str, Column], ...] = (
    ("tokens_per_s", ("tok/s", 7, lambda row: rate(row["tokens_per_s"]))),
    ("tflops", ("TF/s", 8, lambda row: rate(row["tflops"]))),
    ("backward_ms", ("bwd", 7, lambda row: part_milliseconds(row["backward_ms"]))),
    ("saved_memory_bytes", ("saved", 9, lambda row: memory(row["saved_memory_bytes"]))),
    ("roofline_fraction", ("roof", 5, lambda row: percent(row["roofline_fraction"]))),
    ("host_ms", ("host", 7, lambda row: part_milliseconds(row["host_ms"]))),
)
#: Columns of results that no cell shows.
_UNSEEN = [*Case.model_fields, "detail", "executed", "gpu_uuid", "parity_errors", "env_id"]
_MARKS_WIDTH = 2
_GAP = 1
_MOST_LABEL = 40  # a longer label is folded, however wide the terminal is
_MOST_CASE = 0.4  # of the terminal's width; a case with a longer text is a heading
_MANY = 3  # lines; if a case has more, an empty line follows each case


@dataclass(frozen=True)
class LongTable:
    """A table of rows with one EP size.

    `rows` are as moebench.report.ranking.ranked returns them, with three more columns: `flagged` says whether a row has
    a flag that not all rows share, `graph_ms` is the time of a CUDA graph (see cells.graph_times), and `host_ms` is the
    time by the host's clock, where it is not that of `ms`. `sort` is a key of `SORTS`.
    """

    rows: pd.DataFrame
    described: Description
    width: int
    ascii_only: bool
    sort: str = "time"

    @property
    def titles(self) -> set[str]:
        """The titles of the table's columns."""
        return {title for columns in self._layout.columns for title, _, _ in columns}

    def lines(self) -> Iterator[Text]:
        """Yield the lines of the table."""
        layout, (header, cases) = self._layout, self._cases
        if layout.is_flat:
            yield from self._titles(header)
            yield Text(("-" if self.ascii_only else "─") * layout.used_width, style=DIM)
        texts = cases if layout.is_flat else self.described.headings
        places = {label: place for place, label in enumerate(in_order(self.rows["label"]))}
        cases_of: dict[Hashable, list[Row]] = {}
        rows = self.rows.drop(columns=_UNSEEN, errors="ignore")
        for one in rows_of(rows.assign(case_text=texts, place=self.rows["label"].map(places))):
            cases_of.setdefault((one["run_id"], one["case_id"]), []).append(one)
        groups = list(cases_of.values())
        is_spaced = not layout.is_flat or max(map(len, groups)) > _MANY
        for number, group in enumerate(groups):
            if number and is_spaced:
                yield Text()
            if not layout.is_flat:
                yield Text(group[0]["case_text"], style="bold")
                yield from self._titles("")
            for place, row in enumerate(sorted(group, key=SORTS[self.sort])):
                yield from _lines(row, layout, "" if place else row["case_text"])

    @cached_property
    def _cases(self) -> tuple[str, list[str]]:
        return case_column(self.described, self.width)

    @cached_property
    def _layout(self) -> "_Layout":
        header, cases = self._cases
        case_width = max(len(header), max(map(len, cases)))
        return _layout(self.rows, case_width + _GAP if case_width else 0, self.width)

    def _titles(self, header: str) -> Iterator[Text]:
        before = self._layout.case_width + self._layout.label_width + _GAP + _MARKS_WIDTH
        for number, columns in enumerate(self._layout.columns):
            titles = "".join(self._title(title).rjust(size) for title, size, _ in columns)
            yield Text(("" if number else header).ljust(before) + titles.rstrip(), style=DIM)

    def _title(self, title: str) -> str:
        return {"±": "+/-", "×fastest": "xfastest"}.get(title, title) if self.ascii_only else title


@dataclass(frozen=True)
class _Layout:
    """The widths of a table, and the columns of each line of a backend.

    `case_width` is 0 if the cases are headings.
    """

    is_flat: bool
    case_width: int
    label_width: int
    columns: tuple[tuple[Column, ...], ...]

    @property
    def used_width(self) -> int:
        return self.case_width + self.label_width + max(map(_numbers_width, self.columns))


def _layout(rows: pd.DataFrame, case_width: int, width: int) -> _Layout:
    def present(columns: Sequence[tuple[str, Column]]) -> list[Column]:
        return [column for name, column in columns if rows[name].notna().any()]

    longest, parts = min(_MOST_LABEL, max(map(len, rows["label"]))), present(PARTS)
    is_flat = case_width <= _MOST_CASE * width and case_width + longest + _numbers_width((*SPEED, *parts)) <= width
    room = width - case_width * is_flat
    first, *rest = [(*SPEED, *parts)] if longest + _numbers_width((*SPEED, *parts)) <= room else [SPEED, tuple(parts)]
    label_width = max(1, min(longest, room - _numbers_width(first)))
    for column in present(WIDE):
        if label_width + _numbers_width((*first, column)) <= room:
            first = (*first, column)
    return _Layout(is_flat, case_width * is_flat, label_width, (first, *filter(None, rest)))


def _numbers_width(columns: Sequence[Column]) -> int:
    return _GAP + _MARKS_WIDTH + sum(size for _, size, _ in columns)


def _lines(row: Row, layout: _Layout, case: str) -> Iterator[Text]:
    """Yield the case, the label and the cells of a backend. A folded label, or two lines of cells, give several."""
    status = Status(row["status"])
    if status is Status.ok:
        cells = ["".join(cell(row).rjust(size) for _, size, cell in columns) for columns in layout.columns]
        cells = [f"{mark:>{_MARKS_WIDTH}}{line}" for mark, line in zip_longest([marks(row)], cells, fillvalue="")]
    else:
        why = " ".join(mismatch(row)) if status is Status.mismatch else status_text(status)
        cells = [" " * _MARKS_WIDTH + why]
    before = case if layout.is_flat else ""
    for label, cell in zip_longest(_folded(row["label"], layout.label_width), cells, fillvalue=""):
        line = Text(before.ljust(layout.case_width))
        yield line.append(f"{label:<{layout.label_width}} {cell}".rstrip(), style=style_of(row))
        before = ""


def _by_time(row: Row) -> Any:
    return row["status"] != Status.ok, row["time_ms"] if row["status"] == Status.ok else 0


def _by_memory(row: Row) -> Any:
    return pd.isna(row["peak_memory_bytes"]), 0 if pd.isna(row["peak_memory_bytes"]) else row["peak_memory_bytes"]


def _by_backend(row: Row) -> Any:
    return row["place"]


#: How the lines of a case may be sorted, by the name that `moebench show --sort` takes.
SORTS: dict[str, Callable[[Row], Any]] = {"time": _by_time, "memory": _by_memory, "backend": _by_backend}


def _folded(label: str, width: int) -> list[str]:
    """Return the label in lines of at most `width` characters. The dispatcher begins a new line."""
    if len(label) <= width:
        return [label]
    backend, plus, dispatcher = label.rpartition("+")
    return [*_pieces(backend, width), *wrap(" " + plus + dispatcher, width)] if plus else _pieces(label, width)


def _pieces(name: str, width: int) -> list[str]:
    """Return a name in lines of at most `width` characters. Lines end after an underscore where that is possible."""
    lines = [""]
    for word in re.findall("[^_]*_|[^_]+", name):
        if lines[-1] and len(lines[-1] + word) > width:
            lines.append("")
        lines[-1] += word
    return [line[start : start + width] for line in lines for start in range(0, len(line), width)]
