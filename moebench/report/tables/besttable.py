"""Show the best backend of each case as a table in a terminal."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from moebench.report.ranking import TOO_CLOSE, best_of, ranked, wins
from moebench.report.tables.boxes import LongRuled, ruled
from moebench.report.tables.casecolumn import case_column
from moebench.report.tables.cells import (
    DIM,
    FASTEST,
    GRAPH_LEGEND,
    Row,
    graph_times,
    memory,
    milliseconds,
    part_milliseconds,
    times_text,
)
from moebench.results.folder import rows_of, without_samples
from moebench.results.labels import describe, machine

_NUMBERS_WIDTH = 26  # ms, memory and lead, with the gaps before them
_GRAPH_WIDTH = 7
_LEAST_CASE = 24  # characters; if the column of cases would get fewer, the next backend is left out


@dataclass(frozen=True)
class BestTable:
    """The fastest backend of each case, its memory, and its lead over the next backend. A rich renderable."""

    frame: pd.DataFrame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        of_all = ranked(without_samples(self.frame))
        rows = best_of(of_all)
        if rows.empty:
            yield Text("No case has a time.")
            return
        yield Text("\n".join(filter(None, (describe(rows).title(), machine(rows)))), style="bold")
        yield _table(rows.assign(graph_ms=graph_times(rows)), options.max_width)
        yield Text()
        yield Text(_wins_sentence(of_all))
        yield Text("\n".join(_legend(rows)), style=DIM)


def wins_sentence(frame: pd.DataFrame) -> str:
    """Return in how many cases each backend is the fastest. A case that is too close to call is a win for nobody."""
    return _wins_sentence(ranked(frame))


def _wins_sentence(rows: pd.DataFrame) -> str:
    counts, num_close = wins(rows)
    total = sum(counts.values()) + num_close
    texts = [f"{name} {count}" for name, count in counts.items()]
    texts += [f"{TOO_CLOSE} {num_close}"] * bool(num_close)
    return f"wins in {total} cases: {', '.join(texts)}" if total else "no case has times of several backends"


def _table(rows: pd.DataFrame, width: int) -> LongRuled:
    has_graph = bool(rows["graph_ms"].notna().any())
    lines = rows_of(rows)
    fastest = [_fastest(row) for row in lines]
    described, longest = describe(rows), max(map(len, fastest))
    room = width - longest - _NUMBERS_WIDTH - _GRAPH_WIDTH * has_graph
    following = int(rows["next"].fillna("").str.len().max()) + 1
    header, cases = case_column(described, room)
    has_next = room - following >= max(_LEAST_CASE, max(map(len, cases)))
    table = ruled()
    has_cases = bool(described.varying)
    if has_cases:
        table.add_column(Text(header), overflow="fold")
    table.add_column("fastest", overflow="fold")
    for title in ("ms", *["graph"] * has_graph, "memory", "lead"):
        table.add_column(title, justify="right", no_wrap=True)
    if has_next:
        table.add_column("over", overflow="fold")
    cells = (
        [
            *[Text(case)] * has_cases,
            name,
            *map(Text, _numbers(row, has_graph)),
            *[Text(_or_empty(row["next"]))] * has_next,
        ]
        for case, name, row in zip(cases, fastest, lines, strict=True)
    )
    return LongRuled(table, list(cells))


def _or_empty(text: Any) -> str:
    return "" if pd.isna(text) else str(text)


def _fastest(row: Row) -> Text:
    """Return the fastest backend, and at most one that is too close to it to call. Others are counted."""
    close = row["close_to"].split(", ") if row["close_to"] else []
    if not close:
        return Text(row["label"], style="" if pd.isna(row["next"]) else FASTEST)
    return Text(f"{row['label']} ~ {close[0]}" + f" and {len(close) - 1} more" * (len(close) > 1))


def _numbers(row: Row, has_graph: bool) -> Iterator[str]:
    yield milliseconds(row["time_ms"])
    if has_graph:
        yield part_milliseconds(row["graph_ms"])
    yield memory(row["peak_memory_bytes"])
    yield "-" if pd.isna(row["lead"]) else times_text(row["lead"])


def _legend(rows: pd.DataFrame) -> Iterator[str]:
    yield "ms, memory: median time and peak memory of the fastest; lead: time of the next backend divided by its time"
    if graph_times(rows).notna().any():
        yield GRAPH_LEGEND
    if rows["close"].any():
        yield f"A ~ B: {TOO_CLOSE}; the time, the memory and the lead are of the first"
