"""Frame -> a table to read in a terminal: a row a case, backends side by side. No torch here.

Nothing depends on colour, and 80 columns are enough: what all cases share stands in the title, and backends that do not
fit beside each other continue in a second table. Details of what did not run follow, a line for each reason.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from moebench.labels import Description, backend_labels, describe, in_case_order, in_order, machine
from moebench.record import GOOD, Status

_SPEED_WIDTH = 20  # marks 2, time 6, interval 6, parity 5, flag 1
_WORK_WIDTH = 16  # tokens/s 8, TFLOP/s 8
_COLUMN_GAP = 1
_CASE_WIDTH = 14  # the least that a case is squeezed to
_TITLED_PARTS = ("experts", "tokens", "dtype", "mode", "routing", "activation")
_STYLES = {Status.unsupported: "dim", Status.oom: "yellow"}


@dataclass(frozen=True)
class Summary:
    """The table of a run, and the details below it. A rich renderable."""

    frame: pd.DataFrame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.frame.empty:
            yield Text("No rows of results yet.")
            return
        rows = in_case_order(self.frame)
        rows["label"] = backend_labels(rows)
        backends = in_order(rows["label"])
        described = describe(rows)
        longest_word = max(map(len, " ".join([*described.varying, *described.labels]).split()), default=0)
        layout = _layout(options, len(backends), longest_word)
        yield Text("\n".join(filter(None, (described.title(), machine(rows)))), style="bold")
        for start in range(0, len(backends), layout.beside):
            yield _table(rows, described, backends[start : start + layout.beside], layout)
        yield legend(rows)
        details = list(_details(rows))
        if details:
            yield Text()
            yield from details


def summary(frame: pd.DataFrame) -> Summary:
    """A table of every case in `frame`, for `rich.print` or a Console.

    A cell has the median time with half its 95% interval, the parity error over its budget, and below tokens/s and
    TFLOP/s; or the status, where that is not ok. The lowest median of a case has an asterisk.
    """
    return Summary(frame)


def legend(frame: pd.DataFrame) -> Text:
    """How to read the cells of the table of `frame`."""
    per = "process" if frame["gpu"].isna().all() else "GPU"
    marks = {
        "* fastest of its case": fastest_rows(frame).any(),
        "~ interval wider than the target": frame["converged"].eq(False).any(),
        "! flagged, see below": frame["flags"].map(len).any(),
    }
    lines = (
        "ms: median time, and half its 95% interval; err: parity error / budget, <= 1",
        f"passes; tok/s, TFLOP/s: useful work per {per}",
        ";  ".join(mark for mark, present in marks.items() if present),
    )
    return Text("\n".join(filter(None, lines)), style="dim")


def fastest_rows(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows have the lowest median time of their case, where two or more backends have one. Only `ok` competes."""
    times = frame["time_ms"].where(frame["status"] == Status.ok)
    groups = times.groupby([frame["run_id"], frame["case_id"]])
    return (times == groups.transform("min")) & (groups.transform("count") > 1)


def human(value: float) -> str:
    """Three significant digits with a decimal suffix: 105K, 1.23M."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for power, suffix in ((9, "G"), (6, "M"), (3, "K"), (0, "")):
        scaled = float(f"{value:.3g}") / 10**power
        if scaled >= 1:
            return f"{scaled:.{max(0, 2 - math.floor(math.log10(scaled)))}f}{suffix}"
    return f"{value:.2g}"


@dataclass(frozen=True)
class _Layout:
    """What fits a terminal's width."""

    beside: int  # backends beside each other
    case_width: int
    break_: str  # between the speed and the work in a cell: a line break where the width is short
    half: str  # the sign before half an interval


def _layout(options: ConsoleOptions, num_backends: int, longest_word: int) -> _Layout:
    half = "" if options.ascii_only else "±"
    width, least = options.max_width, max(_CASE_WIDTH, longest_word + 1)
    one_line = _SPEED_WIDTH + _WORK_WIDTH + _COLUMN_GAP
    if width >= num_backends * one_line + 2 * least:
        return _Layout(num_backends, width - num_backends * one_line, "", half)
    two_lines = _SPEED_WIDTH + _COLUMN_GAP
    beside = max(1, (width - least) // two_lines)
    beside = math.ceil(num_backends / math.ceil(num_backends / beside))  # as many in each table
    return _Layout(beside, width - beside * two_lines, "\n", half)


def _table(rows: pd.DataFrame, described: Description, backends: list[str], layout: _Layout) -> Table:
    header, labels = _case_column(described, layout.case_width - 1)
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(Text(header), overflow="fold")
    width = _SPEED_WIDTH if layout.break_ else _SPEED_WIDTH + _WORK_WIDTH
    units = f"  {'ms':>6} {layout.half or '+/-':>5} {'err':>4} {layout.break_}  {'tok/s':>6} {'TFLOP/s':>7}"
    folded = {backend: ["  " + line for line in wrap(backend, width - 3)] for backend in backends}
    tallest = max(map(len, folded.values()))
    for lines in folded.values():
        name = "\n".join([""] * (tallest - len(lines)) + lines)
        table.add_column(Text(name + "\n") + Text(units, style="dim"), width=width)

    rows = rows.assign(fastest=fastest_rows(rows), case=labels)
    for _, group in rows.groupby(["run_id", "case_id"], sort=False):
        cells = {row["label"]: _cell(row, layout) for row in group.to_dict("records")}
        table.add_row(group["case"].iloc[0], *(cells.get(backend, Text("  -", style="dim")) for backend in backends))
    return table


def _case_column(described: Description, width: int) -> tuple[str, "pd.Series[str]"]:
    """Header and label of what tells cases apart: in straight columns where `width` allows, else to be wrapped."""
    # the parts that come last, "25% masked" or "EP 8", name themselves
    titles = [str(name) if name in _TITLED_PARTS else "" for name in described.varying]
    wide = [
        max(len(title), int(texts.str.len().max()))
        for title, (_, texts) in zip(titles, described.varying.items(), strict=True)
    ]
    if not titles or sum(wide) + len(wide) - 1 > width:
        return " ".join(filter(None, titles)) or "case", described.labels

    def straight(texts: Iterable[str]) -> str:
        cells = zip(texts, titles, wide, strict=True)
        return " ".join(text.rjust(size) if title == "tokens" else text.ljust(size) for text, title, size in cells)

    labels = [straight(row) for row in described.varying.itertuples(index=False)]
    return straight(titles), pd.Series(labels, index=described.varying.index, dtype="str")


def _cell(row: Mapping[Hashable, Any], layout: _Layout) -> Text:
    status = Status(row["status"])
    if status is Status.mismatch:
        tensor = "" if pd.isna(row["parity_worst_tensor"]) else row["parity_worst_tensor"]
        times = f"{row['parity_worst']:.3g}" + "x" * math.isfinite(row["parity_worst"])
        return Text(f"  MISMATCH {times}{layout.break_}  {tensor}", style="bold red")
    if status is not Status.ok:
        name = status.value if status in GOOD else status.value.upper()
        return Text(f"  {name}", style=_STYLES.get(status, "bold red"))
    marks = ("*" if row["fastest"] else "") + ("~" if row["converged"] is False else "")
    flag = "!" if len(row["flags"]) else " "
    half = _half_interval(row, layout.half)
    speed = f"{marks:>2}{_time(row['time_ms']):>6} {half:>5} {row['parity_worst']:4.2f}{flag}"
    work = f"  {_or_dash(row['tokens_per_s']):>6} {_or_dash(row['tflops']):>7}"
    return Text(speed + layout.break_ + work, style="bold green" if row["fastest"] else "")


def _time(time_ms: float) -> str:
    """Milliseconds in at most six characters."""
    decimals = 4 if time_ms < 0.1 else 3 - min(3, math.floor(math.log10(max(time_ms, 1))))
    return f"{time_ms:.{decimals}f}"


def _half_interval(row: Mapping[Hashable, Any], half: str) -> str:
    share = (row["time_ms_high"] - row["time_ms_low"]) / 2 / row["time_ms"]
    if math.isnan(share):
        return "-"
    return f"{half}{share:.1%}" if share < 0.0995 else f"{half}{share:.0%}"


def _or_dash(value: float) -> str:
    return "-" if math.isnan(value) else human(value)


def _details(rows: pd.DataFrame) -> Iterator[Text]:
    """A line for each distinct reason, failures first, and one for each flag."""
    failed = rows[rows["status"] != Status.ok]
    reasons = failed.groupby(["label", "status", "detail"], sort=False).size().reset_index(name="count")
    for reason in sorted(reasons.to_dict("records"), key=lambda reason: reason["status"] in GOOD):
        times = f" x{reason['count']}" if reason["count"] > 1 else ""
        why = str(reason["detail"]).strip().splitlines()[0]
        style = _STYLES.get(Status(reason["status"]), "red")
        yield Text(f"{reason['label']}: {reason['status']}{times}: {why}", style=style)
    flags = rows[["label", "flags"]].explode("flags").dropna().groupby(["label", "flags"], sort=False).size()
    for row in flags.reset_index(name="count").to_dict("records"):
        yield Text(f"{row['label']}: flagged x{row['count']}: {row['flags']}", style="yellow")
