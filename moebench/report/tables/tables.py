"""Show a frame of results as tables in a terminal, with one row per case and the backends side by side.

The tables can be read without colour and in 80 columns. Each EP size has its own table. The title of a table has the
settings that all its cases share. If the backends do not fit side by side, each backend has a line below its case.
Below the tables, one line per reason says which jobs did not run.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from textwrap import wrap

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from moebench.report.tables.boxes import ruled
from moebench.report.tables.cells import (
    DIM,
    STATUS_STYLES,
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
from moebench.report.tables.longtable import long_table
from moebench.results.labels import Description, backend_labels, describe, in_case_order, in_order, machine
from moebench.results.record import GOOD, Status

_SPEED_WIDTH = 20  # marks 2, time 6, interval 6, parity 5, flag 1
_WORK_WIDTH = 16  # tokens/s 8, TFLOP/s 8
_BUSY_WIDTH = 6  # the GPU's own time; only if a row has it
_COLUMN_GAP = 1
_CASE_WIDTH = 14  # the narrowest column of cases
_TITLED_PARTS = ("experts", "tokens", "dtype", "mode", "routing", "activation")


@dataclass(frozen=True)
class Summary:
    """The tables of a run with the details below the tables, as an object that rich can print."""

    frame: pd.DataFrame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.frame.empty:
            yield Text("No rows of results yet.")
            return
        rows = in_case_order(self.frame)
        rows = rows.assign(label=backend_labels(rows), fastest=fastest_rows(rows))
        ep_sizes = sorted(rows["ep_size"].unique())
        for ep_size in ep_sizes:
            part = rows[rows["ep_size"] == ep_size]
            described, backends = describe(part), in_order(part["label"])
            one_of_several = ["EP 1"] if ep_size == 1 < len(ep_sizes) else []
            title = ", ".join([described.title(), *one_of_several])
            yield Text("\n".join(filter(None, (title, machine(part)))), style="bold")
            layout = _layout(options, len(backends), described, bool(part["busy_ms"].notna().any()))
            if layout is None:
                yield from long_table(part, described, options.max_width, ascii_only=options.ascii_only)
            else:
                yield _table(part, described, backends, layout)
            yield Text()
        yield legend(rows)
        reasons = list(details(rows))
        if reasons:
            yield Text()
            yield from reasons


def summary(frame: pd.DataFrame) -> Summary:
    """Return tables of every case in `frame`, one table per EP size, for `rich.print` or a Console.

    For each backend, a table has the median time with half the width of its 95% confidence interval, the parity error
    divided by its budget, tokens/s and TFLOP/s. A status other than ok replaces these numbers. The lowest median time
    of a case has an asterisk.
    """
    return Summary(frame)


def legend(frame: pd.DataFrame) -> Text:
    """Return the legend of the tables of `frame`."""
    per = "process" if frame["gpu"].isna().all() else "GPU"
    explained = {
        "* fastest of its case": fastest_rows(frame).any(),
        "~ interval wider than the target": frame["converged"].eq(False).any(),
        "! flagged, see below": frame["flags"].map(len).any(),
    }
    ranks = (
        "EP: tokens are per rank; ms: the time of the slowest rank",
        "disp, comp, comb: median ms of dispatch, compute and combine in a forward pass",
        "skew: median ms by which the slowest rank took longer than the fastest",
    )
    lines = (
        "ms: median time; next to it, half of its 95% interval",
        "err: parity error divided by its budget, at most 1 passes",
        f"tok/s, TFLOP/s (TF/s): useful work per {per}",
        *(
            ["busy: median ms in which the GPU worked, in calls that wait for it"]
            * bool(frame["busy_ms"].notna().any())
        ),
        *(ranks if frame["ep_size"].gt(1).any() else ()),
        ";  ".join(mark for mark, present in explained.items() if present),
    )
    return Text("\n".join(filter(None, lines)), style=DIM)


def fastest_rows(frame: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows have the lowest median time of their case. A case with fewer than two times has no such row."""
    times = frame["time_ms"].where(frame["status"] == Status.ok)
    groups = times.groupby([frame["run_id"], frame["case_id"]])
    return (times == groups.transform("min")) & (groups.transform("count") > 1)


@dataclass(frozen=True)
class _Layout:
    """How a terminal table puts backends side by side."""

    case_width: int
    break_: str  # the text between the times and the rates of a cell; a line break if the terminal is narrow
    half: str  # the sign before half the width of an interval
    has_busy: bool  # whether a cell has the GPU's own time

    @property
    def work_width(self) -> int:
        return _WORK_WIDTH + _BUSY_WIDTH * self.has_busy

    @property
    def cell_width(self) -> int:
        return max(_SPEED_WIDTH, self.work_width) if self.break_ else _SPEED_WIDTH + self.work_width


def _layout(options: ConsoleOptions, num_backends: int, described: Description, has_busy: bool) -> _Layout | None:
    """Return the layout, or None if the backends do not fit side by side."""
    longest_word = max(map(len, " ".join([*described.varying, *described.labels]).split()), default=0)
    half = "" if options.ascii_only else "±"
    width, least = options.max_width, max(_CASE_WIDTH, longest_word + 1)
    for break_, least_of_cases in (("", 2 * least), ("\n", least)):
        cells = num_backends * (_Layout(0, break_, half, has_busy).cell_width + _COLUMN_GAP)
        if width >= cells + least_of_cases:
            return _Layout(width - cells, break_, half, has_busy)
    return None


def _table(rows: pd.DataFrame, described: Description, backends: list[str], layout: _Layout) -> Table:
    header, labels = _case_column(described, layout.case_width - 1)
    table = ruled(padding=0)
    table.add_column(Text(header), overflow="fold")
    width = layout.cell_width
    units = f"  {'ms':>6} {layout.half or '+/-':>5} {'err':>4} {layout.break_}  {'tok/s':>6} {'TFLOP/s':>7}"
    units += f"{'busy':>{_BUSY_WIDTH}}" * layout.has_busy
    folded = {backend: ["  " + line for line in wrap(backend, width - 3)] for backend in backends}
    tallest = max(map(len, folded.values()))
    for lines in folded.values():
        name = "\n".join([""] * (tallest - len(lines)) + lines)
        table.add_column(Text(name + "\n") + Text(units, style=DIM), width=width)

    for _, group in rows.assign(case=labels).groupby(["run_id", "case_id"], sort=False):
        cells = {row["label"]: _cell(row, layout) for row in group.to_dict("records")}
        table.add_row(group["case"].iloc[0], *(cells.get(backend, Text("  -", style=DIM)) for backend in backends))
    return table


def _case_column(described: Description, width: int) -> tuple[str, "pd.Series[str]"]:
    """Return header and labels of the parts that vary between cases. The parts are aligned if they fit in `width`."""
    # the last parts, such as "25% masked" or "EP 8", need no title
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


def _cell(row: Row, layout: _Layout) -> Text:
    status = Status(row["status"])
    if status is Status.mismatch:
        text = f"{layout.break_}  ".join(mismatch(row))
        return Text(f"  {text}", style=style_of(row))
    if status is not Status.ok:
        return Text(f"  {status_text(status)}", style=style_of(row))
    flag = "!" if len(row["flags"]) else " "
    half = half_interval(row)
    half = half if half == "-" else layout.half + half
    speed = f"{marks(row):>2}{milliseconds(row['time_ms']):>6} {half:>5} {row['parity_worst']:4.2f}{flag}"
    work = f"  {rate(row['tokens_per_s']):>6} {rate(row['tflops']):>7}"
    work += f"{part_milliseconds(row['busy_ms']):>{_BUSY_WIDTH}}" * layout.has_busy
    return Text(speed + layout.break_ + work, style=style_of(row))


def details(rows: pd.DataFrame) -> Iterator[Text]:
    """Yield one line per reason with the backends that have it, failures first, then one line per flag.

    `rows` have the column `label`.
    """
    failed = rows[rows["status"] != Status.ok]
    reasons = failed["detail"].str.strip().str.split("\n").str[0]
    for (status, reason), some in sorted(
        failed.groupby(["status", reasons], sort=False), key=lambda group: group[0][0] in GOOD
    ):
        style = STATUS_STYLES.get(Status(str(status)), "red")
        yield Text(f"{_names(some)}: {status}{_times(some)}: {reason}", style=style)
    flagged = rows[["label", "flags"]].explode("flags").dropna()
    for flag, some in flagged.groupby("flags", sort=False):
        yield Text(f"{_names(some)}: flagged x{len(some)}: {flag}", style="yellow")


def _names(rows: pd.DataFrame) -> str:
    return ", ".join(in_order(rows["label"]))


def _times(rows: pd.DataFrame) -> str:
    return f" x{len(rows)}" if len(rows) > 1 else ""
