"""Show results as a long table, for more backends than fit side by side in a terminal.

The table has one heading per case, and below the heading one line per backend. Under expert parallelism a line also has
the parts of a forward pass (dispatch, compute, combine) and the skew, which is the difference in time between the
slowest and the fastest rank. If any row has it, each line also has the GPU's own time.
"""

from collections.abc import Callable, Iterator
from itertools import zip_longest
from textwrap import wrap

import pandas as pd
from rich.text import Text

from moebench.report.tables.cells import (
    DIM,
    Row,
    half_interval,
    marks,
    milliseconds,
    mismatch,
    part_milliseconds,
    rate,
    status_text,
    style_of,
)
from moebench.results.labels import Description, in_order
from moebench.results.record import Status

Column = tuple[str, int, Callable[[Row], str]]  # title, width with the space before it, cell

_SPEED: tuple[Column, ...] = (
    ("ms", 6, lambda row: milliseconds(row["time_ms"])),
    ("+/-", 5, half_interval),
    ("tok/s", 6, lambda row: rate(row["tokens_per_s"])),
    ("TF/s", 6, lambda row: rate(row["tflops"])),
    ("err", 5, lambda row: f"{row['parity_worst']:.2f}"),
    ("", 1, lambda row: "!" if len(row["flags"]) else ""),
)
_PARTS: tuple[Column, ...] = (
    ("disp", 6, lambda row: part_milliseconds(row["dispatch_ms"])),
    ("comp", 6, lambda row: part_milliseconds(row["compute_ms"])),
    ("comb", 6, lambda row: part_milliseconds(row["combine_ms"])),
    ("skew", 6, lambda row: part_milliseconds(row["skew_ms"])),
)
_BUSY: Column = ("busy", 6, lambda row: part_milliseconds(row["busy_ms"]))
_MARKS_WIDTH = 2
_LEAST_LABEL = 16  # characters; if a backend's label would get fewer, the parts get a line of their own


def long_table(rows: pd.DataFrame, described: Description, width: int, *, ascii_only: bool) -> Iterator[Text]:
    """Yield the lines of the table. `rows` are sorted and have the columns `label` and `fastest`."""
    has_parts, has_busy = bool((rows["ep_size"] > 1).any()), bool(rows["busy_ms"].notna().any())
    lines_of_columns = _lines_of_columns(width, (*_PARTS * has_parts, *[_BUSY] * has_busy))
    numbers = max(sum(size for _, size, _ in columns) for columns in lines_of_columns)
    longest = max(map(len, rows["label"]))
    label_width = max(1, min(longest, width - numbers - _MARKS_WIDTH - 1))
    places = {label: place for place, label in enumerate(in_order(rows["label"]))}
    rows = rows.assign(heading=described.headings)
    for number, (_, group) in enumerate(rows.groupby(["run_id", "case_id"], sort=False)):
        if number:
            yield Text()
        heading = group["heading"].iloc[0]
        if heading:
            yield Text(heading, style="bold")
        for columns in lines_of_columns:
            titles = "".join(_title(title, ascii_only).rjust(size) for title, size, _ in columns)
            yield Text(" " * (label_width + 1 + _MARKS_WIDTH) + titles.rstrip(), style=DIM)
        for row in sorted(group.to_dict("records"), key=lambda row: places[row["label"]]):
            yield _line(row, label_width, lines_of_columns)


def _lines_of_columns(width: int, parts: tuple[Column, ...]) -> list[tuple[Column, ...]]:
    one_line = (*_SPEED, *parts)
    fits = _LEAST_LABEL + 1 + _MARKS_WIDTH + sum(size for _, size, _ in one_line) <= width
    return [one_line] if fits or not parts else [_SPEED, parts]


def _title(title: str, ascii_only: bool) -> str:
    return "±" if title == "+/-" and not ascii_only else title


def _line(row: Row, label_width: int, lines_of_columns: list[tuple[Column, ...]]) -> Text:
    """Return the label and cells of a backend. A folded label, or two lines of cells, give several lines."""
    status = Status(row["status"])
    if status is Status.ok:
        cells = ["".join(cell(row).rjust(size) for _, size, cell in columns) for columns in lines_of_columns]
        cells = [f"{mark:>{_MARKS_WIDTH}}{line}" for mark, line in zip_longest([marks(row)], cells, fillvalue="")]
    else:
        why = " ".join(mismatch(row)) if status is Status.mismatch else status_text(status)
        cells = [" " * _MARKS_WIDTH + why]
    pieces = zip_longest(_folded(row["label"], label_width), cells, fillvalue="")
    return Text("\n".join(f"{label:<{label_width}} {cell}".rstrip() for label, cell in pieces), style=style_of(row))


def _folded(label: str, width: int) -> list[str]:
    """Return the label in lines of at most `width` characters. The dispatcher begins a new line."""
    if len(label) <= width:
        return [label]
    backend, plus, dispatcher = label.rpartition("+")
    return [*wrap(backend or label, width), *wrap(" " + plus + dispatcher, width)] if plus else wrap(label, width)
