"""Show a frame of results as tables in a terminal.

First comes the best backend of each case. Contexts of training have a table beside `plain`. Then each EP size has a
table with one line for each backend of a case. The title of a table has the settings that all its cases share. Below
the tables, a legend explains their columns and signs, one line per reason says which jobs did not run, and one line per
flag explains it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from moebench.errors import UsageError
from moebench.report.flags import explained, own_flags, shared_flags
from moebench.report.ranking import TOO_CLOSE, fastest_rows, ranked
from moebench.report.tables.besttable import BestTable
from moebench.report.tables.boxes import Lines
from moebench.report.tables.cells import DIM, GRAPH_LEGEND, STATUS_STYLES, graph_times
from moebench.report.tables.contexttable import ContextTable
from moebench.report.tables.longtable import SORTS, LongTable
from moebench.results.advise import CLOSE
from moebench.results.compare import beside_plain
from moebench.results.folder import without_samples
from moebench.results.labels import describe, in_order, machine
from moebench.results.record import GOOD, Status

__all__ = ["Summary", "details", "fastest_rows", "legend", "summary"]

_MOST_NAMES = 4  # of backends in one line of details


@dataclass(frozen=True)
class Summary:
    """The tables of a run with the details below the tables, as an object that rich can print."""

    frame: pd.DataFrame
    sort: str = "time"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.frame.empty:
            yield Text("No rows of results yet.")
            return
        frame = without_samples(self.frame)
        rows = ranked(frame)
        rows = rows.assign(
            flagged=own_flags(rows, shared_flags(rows)),
            graph_ms=graph_times(rows),
            host_ms=rows["host_time_ms"].where(rows["gpu"].notna()),  # on a CPU, the host's clock measures all times
        )
        if _has_several_cases(rows):
            yield BestTable(frame)
            yield Text()
        contexts = beside_plain(frame)
        if len(contexts):
            yield ContextTable(contexts)
            yield Text()
        ep_sizes, titles = sorted(rows["ep_size"].unique()), set()
        for ep_size in ep_sizes:
            part = rows[rows["ep_size"] == ep_size]
            described = describe(part)
            one_of_several = ["EP 1"] if ep_size == 1 < len(ep_sizes) else []
            title = ", ".join([described.title(), *one_of_several])
            yield Text("\n".join(filter(None, (title, machine(part)))), style="bold")
            table = LongTable(part, described, options.max_width, options.ascii_only, self.sort)
            yield Lines(table.lines())
            titles |= table.titles
            yield Text()
        yield legend(rows, titles, ascii_only=options.ascii_only)
        reasons = list(details(rows))
        if reasons:
            yield Text()
            yield from reasons


def summary(frame: pd.DataFrame, sort: str = "time") -> Summary:
    """Return the tables of `frame`, for `rich.print` or a Console.

    For each backend of a case, a table has the median time with half the width of its 95% confidence interval, the time
    divided by the lowest time of the case, peak memory, tokens/s, and the parity error divided by its budget. A status
    other than ok replaces these numbers. `sort` is the order of the backends of a case, a key of `SORTS`. Raises
    UsageError for another order.
    """
    if sort not in SORTS:
        raise UsageError(f"--sort {sort}: it must be one of {', '.join(SORTS)}")
    return Summary(frame, sort)


def _has_several_cases(rows: pd.DataFrame) -> bool:
    is_compared = rows["fastest"] | rows["close"]
    return len(rows.loc[is_compared, ["run_id", "case_id"]].drop_duplicates()) > 1


def legend(rows: pd.DataFrame, titles: Collection[str], *, ascii_only: bool = False) -> Text:
    """Return the legend of tables of `rows` that have columns with these titles."""
    signs = ("+/-", "x") if ascii_only else ("±", "×")
    per = "process" if rows["gpu"].isna().all() else "GPU"
    rates = [title for title in ("tok/s", "TF/s") if title in titles]
    parts = [title for title in ("disp", "comp", "comb") if title in titles]
    explained_columns = {
        "ms": f"ms: median time; {signs[0]}: half of its 95% interval",
        "×fastest": f"{signs[1]}fastest: time divided by the lowest time of the case",
        "memory": "memory: peak memory of the call, without weights and inputs",
        "saved": "saved: memory that the forward pass keeps for the backward pass",
        "tok/s": f"{', '.join(rates)}: useful work per {per}, tokens and TFLOP per second",
        "err": "err: parity error divided by its budget, at most 1 passes",
        "graph": GRAPH_LEGEND,
        "busy": "busy: median ms in which the GPU worked, in calls that wait for it",
        "disp": f"{', '.join(parts)}: median ms of dispatch, compute and combine in a forward pass",
        "skew": "skew: median ms by which the slowest rank took longer than the fastest",
        "bwd": "bwd: median ms of the backward pass, which is a part of ms",
        "roof": "roof: share of the speed that the machine allows at most",
        "host": "host: ms of one call by the clock of the host",
    }
    lines = [text for title, text in explained_columns.items() if title in titles]
    if rows["ep_size"].gt(1).any():
        lines.append("EP: tokens are per rank; ms: the time of the slowest rank")
    marks = {
        "* fastest of its case": rows["fastest"].any(),
        f"~ {TOO_CLOSE}: the interval reaches the fastest, or the times differ by less than {CLOSE:.0%}": (
            rows["close"].any()
        ),
        "! flagged, see below": rows["flagged"].any(),
    }
    return Text("\n".join([*lines, *(mark for mark, is_there in marks.items() if is_there)]), style=DIM)


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
    shared = shared_flags(rows)
    num_ok = int((rows["status"] == Status.ok).sum())
    for name in shared:
        yield Text(f"all {num_ok} rows: {explained(name)}", style="yellow")
    flagged = rows[["label", "flags"]].explode("flags").dropna()
    for flag, some in flagged[~flagged["flags"].isin(shared)].groupby("flags", sort=False):
        yield Text(f"! {explained(str(flag))} ({_names(some)}{_times(some)})", style="yellow")


def _names(rows: pd.DataFrame) -> str:
    names = in_order(rows["label"])
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + f" and {rest} more" * (rest > 0)


def _times(rows: pd.DataFrame) -> str:
    return f" x{len(rows)}" if len(rows) > 1 else ""
